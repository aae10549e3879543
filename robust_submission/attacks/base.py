"""What an attack is: its contract, its checks, and its random draws."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from robust_submission.cli.errors import UserError

Model = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W), float32, RGB, 0 to 1, to logits (B, num_classes)."""


class Attack(Protocol):
    """Images in, images of the same shape out, inside the attack's ball and inside 0 to 1.

    An attack stores no model; it leaves the model's mode, every `requires_grad` and `.grad`, and
    the global random state as found.
    """

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Any callable from images to logits.
            images: (B, 3, H, W), float32, RGB, 0 to 1.
            labels: (B,), int64: the true classes, or the wanted ones where the attack is targeted.
            generator: Source of every random draw, best on the images' device. Without it and
                without `seeds` the attack's own `seed` is used: then every call draws the same.
            seeds: (B,), int64, one seed an image (`image_seeds`): the draws for an image are then
                the same in any batch, at any place.

        Raises:
            UserError: the batch breaks the contract.
        """
        ...


@contextmanager
def differentiable() -> Iterator[None]:
    """Record gradients also where the caller switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor without its history, copied only where it was made under inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless images and labels are as the contract says; reads no values."""
    if images.ndim != 4 or images.dtype != torch.float32:
        raise UserError(
            "Expected images of shape (B, 3, H, W), float32. "
            f"Received: shape {tuple(images.shape)}, {images.dtype}."
        )
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        raise UserError(
            f"Expected one label per image, {len(images)} in all. "
            f"Received: labels of shape {tuple(labels.shape)}."
        )


def check_differentiable(followed: bool) -> None:
    """Raise ValueError unless autograd can follow the logits back to the images."""
    if not followed:
        raise UserError(
            "Expected a model that autograd can differentiate. Received: logits without a "
            "gradient; attack it with square or by transfer."
        )


def check_choice(field: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise UserError(f"Expected {field} to be one of {', '.join(known)}. Received: {value!r}.")


def check_at_least(field: str, value: float, least: float) -> None:
    """Raise ValueError unless `value` is a finite number of at least `least`."""
    if not least <= value < float("inf"):
        raise UserError(f"Expected {field} of at least {least}. Received: {field}={value}.")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: whether the label has the largest logit; never where a logit is NaN."""
    return (logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)


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
            UserError: both `generator` and `seeds` are given, or not one seed an image.
        """
        if seeds is None:
            return cls((generator or torch.Generator().manual_seed(seed),), per_image=False)
        if generator is not None:
            raise UserError("Expected either a generator or seeds. Received: both.")
        if seeds.shape != (batch,):
            raise UserError(
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
