"""Random draws that do not depend on the batch an image happens to be in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def image_seeds(seed: int, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """One seed an image, a function of (seed, index) alone.

    Args:
        seed: The seed of the whole evaluation, 0 or more.
        indices: (B,), the images' places in their data source.

    Returns:
        (B,), int64, on the CPU.
    """
    states = [
        np.random.SeedSequence([seed, int(index)]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        for index in indices
    ]
    return torch.tensor([int(state) for state in states], dtype=torch.int64)


@dataclass(frozen=True)
class Draws:
    """Uniform and normal noise for a batch: from one generator, or from one for each image."""

    generators: tuple[torch.Generator, ...]
    per_image: bool

    @classmethod
    def choose(
        cls, batch: int, generator: torch.Generator | None, seeds: Tensor | None, seed: int
    ) -> "Draws":
        """The draws that an attack's arguments ask for; `seed` where they ask for none.

        Raises:
            ValueError: both `generator` and `seeds` are given, or not one seed an image.
        """
        if seeds is None:
            return cls((generator or torch.Generator().manual_seed(seed),), per_image=False)
        if generator is not None:
            raise ValueError("Expected either a generator or seeds. Received: both.")
        if seeds.shape != (batch,):
            raise ValueError(
                f"Expected one seed an image, shape ({batch},). Received: {tuple(seeds.shape)}."
            )
        return cls(tuple(torch.Generator().manual_seed(each) for each in seeds.tolist()), True)

    def of(self, rows: Tensor) -> "Draws":
        """The draws of some images of the batch; `rows` (N,) are their places."""
        if not self.per_image:
            return self
        return Draws(tuple(self.generators[row] for row in rows.tolist()), per_image=True)

    def uniform(self, images: Tensor) -> Tensor:
        """Like `images`, uniform from 0 to below 1."""
        return self._draw(torch.rand, images)

    def normal(self, images: Tensor) -> Tensor:
        """Like `images`, of mean 0 and deviation 1."""
        return self._draw(torch.randn, images)

    def _draw(self, draw: Callable[..., Tensor], images: Tensor) -> Tensor:
        if not self.per_image:
            (generator,) = self.generators
            return draw(images.shape, generator=generator, device=generator.device).to(images)
        # From pinned memory a GPU copies without having the CPU wait for what it still computes.
        noise = torch.empty(images.shape, pin_memory=images.is_cuda)
        for one, generator in zip(noise, self.generators, strict=True):
            draw(one.shape, generator=generator, out=one)
        return noise.to(images, non_blocking=True)
