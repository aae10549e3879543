"""Augmentation of training images with albumentations, as a pure function of (image, rng).

albumentations keeps random state in each transform and mixes torch's worker seed into it; here
the state is replaced before each call, so that neither workers nor earlier calls matter.
albumentations is imported at the first use: prediction never needs it.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.images import resize_image

if TYPE_CHECKING:
    import albumentations

AUGMENTATIONS = ("none", "light", "augmix", "imagenet", "challenge")


def apply_transform(
    transform: "albumentations.BasicTransform | albumentations.BaseCompose",
    image: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """albumentations' `transform` as a function of (image, rng); leaves `image` as it is."""
    transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return transform(image=image)["image"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to a training image, and how strongly."""

    name: str = "none"
    """none (resize only), light (shift by a padded crop, flip), augmix (light, then a mix of chains
    of mild operations), imagenet (random crop, flip) or challenge (random crop, then 32 operations,
    each with probability 0.05; the challenge's 2nd place)."""
    image_size: int = 32
    """Side of the result in pixels."""
    flip: bool = True
    """Mirror half of the images left to right; off for digits and letters. challenge: mirror 5 %,
    and 5 % upside down."""
    padding: float = 4 / 32
    """light, augmix: the largest shift, as a share of the side; the edge is reflected."""
    min_scale: float = 0.08
    """imagenet, challenge: the smallest share of the image's area that a crop takes."""

    def __post_init__(self) -> None:
        if self.name not in AUGMENTATIONS:
            known = ", ".join(AUGMENTATIONS)
            raise UserError(f"expected an augmentation among {known}, found {self.name!r}.")
        if self.image_size < 1:
            raise UserError(f"expected an image_size of at least 1, found {self.image_size}.")
        if not 0 <= self.padding < 1:
            raise UserError(f"expected a padding from 0 to below 1, found {self.padding}.")
        if not 0 < self.min_scale <= 1:
            raise UserError(f"expected a min_scale above 0 and up to 1, found {self.min_scale}.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augment one image.

        Args:
            image: uint8 (H, W, 3), RGB; left as it is.
            rng: All randomness comes from it.

        Returns:
            uint8 (image_size, image_size, 3).
        """
        if self.name == "none":
            return resize_image(image, self.image_size)
        if self.name in ("light", "augmix"):
            image = resize_image(image, self.image_size)
        return apply_transform(self._compose, image, rng)

    def __getstate__(self) -> dict[str, object]:
        """The settings alone: a worker process builds its own transforms."""
        return {key: value for key, value in vars(self).items() if key != "_compose"}

    @cached_property
    def _compose(self) -> "albumentations.Compose":
        from robust_submission.data.transforms import compose

        return compose(self)
