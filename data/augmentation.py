"""Augmentation of training images with albumentations, as a pure function of (image, rng).

albumentations keeps random state in each transform and mixes torch's worker seed into it; here
the state is replaced before each call, so that neither workers nor earlier calls matter.
albumentations is imported at the first use: prediction never needs it.
"""

import os
import random
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from data.images import resize_image

if TYPE_CHECKING:
    import albumentations

AUGMENTATIONS = ("none", "light", "imagenet")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to a training image, and how strongly."""

    name: str = "none"
    """none (resize only), light (shift by a padded crop, flip) or imagenet (random crop, flip)."""
    image_size: int = 32
    """Side of the result in pixels."""
    flip: bool = True
    """Mirror half of the images left to right; off for digits and letters."""
    padding: float = 4 / 32
    """light: the largest shift, as a share of the side; the edge is filled by reflection."""
    min_scale: float = 0.08
    """imagenet: the smallest share of the image's area that a crop takes."""

    def __post_init__(self) -> None:
        if self.name not in AUGMENTATIONS:
            known = ", ".join(AUGMENTATIONS)
            raise ValueError(f"expected an augmentation among {known}, found {self.name!r}.")
        if self.image_size < 1:
            raise ValueError(f"expected an image_size of at least 1, found {self.image_size}.")
        if not 0 <= self.padding < 1:
            raise ValueError(f"expected a padding from 0 to below 1, found {self.padding}.")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"expected a min_scale above 0 and up to 1, found {self.min_scale}.")

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
        if self.name == "light":
            image = resize_image(image, self.image_size)
        self._compose.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        return self._compose(image=image)["image"]

    def __getstate__(self) -> dict[str, object]:
        """The settings alone: a worker process builds its own transforms."""
        return {key: value for key, value in vars(self).items() if key != "_compose"}

    @cached_property
    def _compose(self) -> "albumentations.Compose":
        # Set before the import, which else looks for a newer version over the network.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations
        import cv2

        cv2.setNumThreads(0)  # workers are the parallelism, and OpenCV's threads don't survive fork
        size = (self.image_size, self.image_size)
        pixels = round(self.padding * self.image_size)
        transforms: dict[str, list[albumentations.BasicTransform]] = {
            "light": [
                albumentations.Pad(padding=pixels, border_mode=cv2.BORDER_REFLECT_101),
                albumentations.RandomCrop(*size),
            ],
            "imagenet": [
                albumentations.RandomResizedCrop(
                    size=size,
                    scale=(self.min_scale, 1.0),
                    interpolation=cv2.INTER_CUBIC,
                    area_for_downscale="image",
                ),
            ],
        }
        flips = [albumentations.HorizontalFlip(p=0.5)] if self.flip else []
        return albumentations.Compose([*transforms[self.name], *flips])


def build_augmentation(name: str, image_size: int, *, flip: bool = True) -> Augmentation:
    """The augmentation `name` (none, light, imagenet) at its usual strength.

    Raises:
        ValueError: an unknown name.
    """
    return Augmentation(name=name, image_size=image_size, flip=flip)
