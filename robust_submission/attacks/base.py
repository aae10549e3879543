"""What every attack shares: its contract, start, checks, gradient and random draws."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from robust_submission.cli.errors import UserError

Model = Callable[[Tensor], Tensor]
"""Maps images (B, 3, H, W), float32, RGB, 0 to 1, to logits (B, num_classes)."""


class Attack(Protocol):
    """Returns adversarial images of the same shape, inside the attack's ball and inside 0 to 1.

    An attack stores no model. It leaves the model's mode, every `requires_grad` and `.grad`, and
    the global random state unchanged.
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
            labels: (B,), int64: the true classes, or the target classes of a targeted attack.
            generator: Source of all random draws, ideally on the images' device. Without
                `generator` and `seeds` the attack's own `seed` is used, so that every call draws
                the same numbers.
            seeds: (B,), int64, one seed per image (see `image_seeds`): the draws for an image then
                do not depend on its batch or its place in it.

        Raises:
            ValueError: the batch or its sources of randomness break this contract.
            UserError: the attack needs gradients and the model has none.
        """
        ...


class BallAttack(ABC):
    """An `Attack` within one ball: does what all of them do first, then calls `_perturb`."""

    epsilon: float
    seed: int = 0

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch: see `Attack`."""
        with attacking(images, labels) as (images, labels):
            draws = Draws.choose(len(images), generator, seeds, self.seed)
            if self.epsilon == 0 or len(images) == 0:
                return images.clone()
            return self._perturb(model, images, labels, draws)

    @abstractmethod
    def passes(self, num_classes: int) -> int:
        """About how many forward and backward passes of the model it makes per image, at most."""

    @abstractmethod
    def _perturb(self, model: Model, images: Tensor, labels: Tensor, draws: "Draws") -> Tensor:
        """Attack a batch that is not empty, within a ball that is more than a point."""


@contextmanager
def attacking(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Check a batch and record gradients, also where the caller switched them off.

    Yields images and labels without their history; copies those made under inference mode.

    Raises:
        ValueError: images or labels are of the wrong shape or type.
    """
    check_batch(images, labels)
    with torch.inference_mode(False), torch.enable_grad():
        images, labels = (
            each.clone() if each.is_inference() else each.detach() for each in (images, labels)
        )
        yield images, labels


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless images and labels are as the contract says; reads no values."""
    if images.ndim != 4 or images.dtype != torch.float32:
        found = f"shape {tuple(images.shape)}, {images.dtype}"
        raise ValueError(f"images: expected shape (B, 3, H, W), float32, found {found}.")
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        found = f"shape {tuple(labels.shape)}"
        raise ValueError(f"labels: expected one per image, {len(images)} in all, found {found}.")


def require_gradient(exists: bool) -> None:
    """Raise UserError if autograd cannot follow the logits back to the images."""
    if not exists:
        raise UserError(
            "model: expected one that autograd can differentiate, found logits without a gradient; "
            "attack it with square or by transfer."
        )


def input_gradient(
    model: Model, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradient of each image's loss with respect to the image, and the logits.

    Computes no gradient for any parameter. Needs gradients to be recorded where it is called. On
    its way through the model each image's gradient is scaled by a power of two, so that it is near
    1 at the logits, and scaled back at the end: that of a confident image would vanish in float16.
    Where the images of a batch affect one another (batch normalisation in training mode), these
    powers weight one image's effect on another's loss.

    Args:
        model: Any callable from images to logits.
        images: (B, 3, H, W), float32.
        labels: (B,), int64, or any other labels of the loss.
        loss: From logits and labels to (B,); one of `attacks.losses`.

    Returns:
        (B, 3, H, W), as autograd gives it (it may hold NaN), and (B, num_classes), float32.

    Raises:
        UserError: autograd cannot follow the logits back to the images.
    """
    images = images.detach().requires_grad_()
    outputs = model(images)
    logits, narrow = outputs.float(), outputs.dtype == torch.float16
    require_gradient(logits.requires_grad)
    (outer,) = torch.autograd.grad(loss(logits, labels).sum(), logits, retain_graph=narrow)
    powers = outer.abs().amax(dim=1, keepdim=True).clamp(1e-30, 1e30).log2().floor().exp2()
    (gradient,) = torch.autograd.grad(
        logits, images, outer / powers, allow_unused=True, retain_graph=narrow
    )
    require_gradient(gradient is not None)
    if narrow and not gradient.flatten(1).any(dim=1).all():  # underflow: as large as float16 allows
        powers = powers / 2**14
        (gradient,) = torch.autograd.grad(logits, images, outer / powers)
    return gradient * powers[:, :, None, None], logits.detach()


def check_choice(field: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{field}: expected one of {', '.join(known)}, found {value!r}.")


def check_at_least(field: str, value: float, least: float) -> None:
    """Raise ValueError unless `value` is a finite number of at least `least`."""
    if not least <= value < math.inf:
        expected = "a finite number" if value == math.inf else f"at least {least}"
        raise ValueError(f"{field}: expected {expected}, found {value}.")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: whether the label has the largest logit; False where a logit is NaN."""
    return (logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)


def image_seeds(seed: int, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """One seed per image, a function of (seed, index) alone.

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
    """Uniform and normal noise for a batch, from one generator or from one per image."""

    generators: tuple[torch.Generator, ...]
    source: Literal["seed", "generator", "seeds"]
    """Which of the arguments of `choose` made the generators; "seeds" makes one per image."""

    @classmethod
    def choose(
        cls, batch: int, generator: torch.Generator | None, seeds: Tensor | None, seed: int
    ) -> "Draws":
        """From an attack's arguments; from `seed` if it has neither generator nor seeds.

        Raises:
            ValueError: both `generator` and `seeds` are given, or not one seed per image.
        """
        if seeds is None:
            source = "seed" if generator is None else "generator"
            return cls((generator or torch.Generator().manual_seed(seed),), source)
        if generator is not None:
            raise ValueError("randomness: expected a generator or seeds, found both.")
        if seeds.shape != (batch,):
            found = tuple(seeds.shape)
            raise ValueError(f"seeds: expected one per image, shape ({batch},), found {found}.")
        return cls(tuple(torch.Generator().manual_seed(each) for each in seeds.tolist()), "seeds")

    def of(self, rows: Tensor) -> "Draws":
        """The draws for some images of the batch; `rows` (N,) are their places in it."""
        if self.source != "seeds":
            return self
        return Draws(tuple(self.generators[row] for row in rows.tolist()), "seeds")

    def batch_seed(self) -> int:
        """One seed for the whole batch, for a library that wants a number."""
        if self.source == "generator":
            (generator,) = self.generators
            return int(torch.randint(2**31, (), generator=generator, device=generator.device))
        return sum(each.initial_seed() for each in self.generators) % 2**31

    def uniform(self, images: Tensor) -> Tensor:
        """Noise of the shape of `images`, uniform from 0 to below 1."""
        return self._draw(torch.rand, images)

    def normal(self, images: Tensor) -> Tensor:
        """Noise of the shape of `images`, with mean 0 and standard deviation 1."""
        return self._draw(torch.randn, images)

    def _draw(self, draw: Callable[..., Tensor], images: Tensor) -> Tensor:
        if self.source != "seeds":
            (generator,) = self.generators
            return draw(images.shape, generator=generator, device=generator.device).to(images)
        # A GPU copies from pinned memory while the CPU continues.
        noise = torch.empty(images.shape, pin_memory=images.is_cuda)
        for one, generator in zip(noise, self.generators, strict=True):
            draw(one.shape, generator=generator, out=one)
        return noise.to(images, non_blocking=images.is_cuda)
