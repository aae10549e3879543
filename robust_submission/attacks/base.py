"""What an attack is, and the checks that all of them share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

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
            ValueError: the batch breaks the contract.
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
        raise ValueError(
            "Expected images of shape (B, 3, H, W), float32. "
            f"Received: shape {tuple(images.shape)}, {images.dtype}."
        )
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        raise ValueError(
            f"Expected one label per image, {len(images)} in all. "
            f"Received: labels of shape {tuple(labels.shape)}."
        )


def check_differentiable(followed: bool) -> None:
    """Raise ValueError unless autograd can follow the logits back to the images."""
    if not followed:
        raise ValueError(
            "Expected a model that autograd can differentiate. Received: logits without a "
            "gradient; attack it with square or by transfer."
        )


def check_choice(field: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"Expected {field} to be one of {', '.join(known)}. Received: {value!r}.")


def check_at_least(field: str, value: float, least: float) -> None:
    """Raise ValueError unless `value` is a finite number of at least `least`."""
    if not least <= value < float("inf"):
        raise ValueError(f"Expected {field} of at least {least}. Received: {field}={value}.")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: whether the label has the largest logit; never where a logit is NaN."""
    return (logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)
