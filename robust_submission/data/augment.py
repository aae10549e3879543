"""Augmentation of training images with albumentations, as a pure function of (image, rng).

albumentations keeps random state in each transform and mixes torch's worker seed into it; here
the state is replaced before each call, so that neither workers nor earlier calls matter.

Importing this file takes a second, for albumentations; loaders and prediction do without it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from torch.nn import functional as F

from robust_submission.cli.errors import UserError
from robust_submission.data.challenge_operations import (
    FLIPS,
    Drawn,
    Transform,
    challenge_operations,
)
from robust_submission.data.policies import POLICIES, erase

CHALLENGE_RESIZE = 256 / 224
"""challenge: the shorter side that crops are taken from, as a multiple of the result's side."""


def apply_transform(
    transform: Transform, image: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """albumentations' `transform` as a function of (image, rng); leaves `image` as it is."""
    transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return transform(image=image)["image"]


def resample(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a training image, bicubic and antialiased, to uint8 (height, width, 3).

    torch is within two levels of Pillow, which `resize_image` uses, and several times as fast; but
    its last bit depends on the processor. `image` is uint8 (H, W, 3).
    """
    # (1, 3, H, W) in this order, so that torch sees channels_last, and answers in the same.
    pixels = torch.from_numpy(np.require(image, requirements="W"))[None].permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def resize_shorter_side(image: np.ndarray, side: int) -> np.ndarray:
    """Scale the shorter side to `side` pixels; an image of that size comes back as it is."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter == side:
        return image
    return resample(image, round(height * side / shorter), round(width * side / shorter))


def _central_square(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


class ShiftAndFlip(A.ImageOnlyTransform):
    """Shift an image, whose edge is reflected, and mirror half of the images left to right.

    albumentations' Pad, RandomCrop and HorizontalFlip, with the same draws and pixels, as one
    transform: for small images most of their time is what surrounds them.
    """

    def __init__(self, pixels: int, *, flip: bool) -> None:
        """`pixels` is the largest shift in each direction."""
        super().__init__(p=1)
        self.pixels, self.flip = pixels, flip

    def apply(self, img: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
        """Cut a window of the image's size from the padded image."""
        draw, (height, width) = self.py_random.random, img.shape[:2]
        edge = self.pixels
        padded = cv2.copyMakeBorder(img, edge, edge, edge, edge, cv2.BORDER_REFLECT_101)
        top, left = (int((2 * self.pixels + 1) * draw()) for _ in range(2))
        shifted = padded[top : top + height, left : left + width]
        return np.ascontiguousarray(shifted[:, ::-1] if self.flip and draw() < 0.5 else shifted)


class RandomCrop(A.RandomResizedCrop):
    """albumentations' random crop, as large as it draws it, resized by `resample`."""

    def apply(
        self, img: np.ndarray, crop_coords: tuple[int, int, int, int], **params: Any
    ) -> np.ndarray:
        """Cut out and resize; `crop_coords` are left, top, right and bottom."""
        left, top, right, bottom = crop_coords
        return resample(img[top:bottom, left:right], *self.size)


class AugMix(A.ImageOnlyTransform):
    """An image mixed with chains of mild changes (Hendrycks et al. 2020, arXiv 1912.02781).

    (1 - m) image + m (w_1 chain_1(image) + w_2 ... + w_3 ...), w from Dirichlet(1, 1, 1), m from
    Beta(1, 1); a chain is one to three operations, none of them a test corruption, at the paper's
    severity 3. The paper's consistency loss is not part of it. Images are uint8 (H, W, 3), RGB.
    """

    def __init__(self, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.operation = A.OneOf(
            [
                A.AutoContrast(method="pil"),
                A.Equalize(mode="pil"),
                A.Posterize(num_bits=(3, 4)),
                A.Solarize(threshold_range=(0.7, 1)),
                A.Affine(rotate=(-9, 9)),
                A.Affine(shear={"x": (-5, 5), "y": (0, 0)}),
                A.Affine(shear={"x": (0, 0), "y": (-5, 5)}),
                A.Affine(translate_percent={"x": (-0.1, 0.1), "y": (0, 0)}),
                A.Affine(translate_percent={"x": (0, 0), "y": (-0.1, 0.1)}),
            ],
            p=1,
        )

    def apply(self, img: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
        """Mix the image with three chains; a weighted mean stays in 0 to 255."""
        self.operation.set_random_state(self.random_generator, self.py_random)
        share = self.random_generator.beta(1, 1)
        mixed = (1 - share) * img
        for weight in self.random_generator.dirichlet((1, 1, 1)):
            mixed += share * weight * self._chain(img)
        return np.rint(mixed).astype(np.uint8)

    def _chain(self, image: np.ndarray) -> np.ndarray:
        for _ in range(self.random_generator.integers(1, 4)):
            image = self.operation(image=image)["image"]
        return image


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
    and turn 5 % upside down."""
    padding: float = 4 / 32
    """light, augmix: the largest shift, as a share of the side; the edge is reflected."""
    min_scale: float = 0.08
    """imagenet, challenge: the smallest share of the image's area that a crop covers."""
    policy: str = "none"
    """What follows `name`: none, randaugment or trivialaugment."""
    erasing: float = 0.0
    """Share of the images in which a box is erased, after all else."""

    def __post_init__(self) -> None:
        if self.name not in AUGMENTATIONS:
            known = ", ".join(AUGMENTATIONS)
            raise UserError(f"augmentation: expected one of {known}, found {self.name!r}.")
        if self.policy not in ("none", *POLICIES):
            known = ", ".join(POLICIES)
            raise UserError(f"policy: expected one of none, {known}, found {self.policy!r}.")
        if not 0 <= self.erasing <= 1:
            raise UserError(f"erasing: expected from 0 to 1, found {self.erasing}.")
        if self.image_size < 1:
            raise UserError(f"image_size: expected at least 1, found {self.image_size}.")
        if not 0 <= self.padding < 1:
            raise UserError(f"padding: expected from 0 to below 1, found {self.padding}.")
        if not 0 < self.min_scale <= 1:
            raise UserError(f"min_scale: expected above 0 and up to 1, found {self.min_scale}.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augment one image.

        Args:
            image: uint8 (H, W, 3), RGB; left as it is.
            rng: All randomness comes from it.

        Returns:
            uint8 (image_size, image_size, 3), RGB.
        """
        if self.name in ("none", "light", "augmix"):
            image = resize_shorter_side(_central_square(image), self.image_size)
        elif self.name == "challenge":
            image = resize_shorter_side(image, round(self.image_size * CHALLENGE_RESIZE))
        if not self._chain:
            return image
        draws = random.Random(int(rng.integers(2**63)))
        draws.random()  # what A.Compose draws, whose checks take longer than small transforms
        for transform in self._chain:
            transform.set_random_state(rng, draws)
            image = transform(image=image)["image"]
        return image

    @property
    def least_side(self) -> int:
        """A shorter side in pixels that shows as much as a larger one (`StoredSource.least_side`).

        Twice the side that it is scaled to: the difference is then less than between bicubic and
        Lanczos. Of crops, the smallest is not enlarged (down to height / width = 3 / 4).
        """
        if self.name == "imagenet":
            return ceil(self.image_size / (self.min_scale * 3 / 4) ** 0.5)
        resized = CHALLENGE_RESIZE if self.name == "challenge" else 1
        return 2 * round(self.image_size * resized)

    def __getstate__(self) -> dict[str, object]:
        """The settings alone: a worker process builds its own transforms."""
        return {key: value for key, value in vars(self).items() if key != "_chain"}

    @cached_property
    def _chain(self) -> list[Transform]:
        cv2.setNumThreads(0)  # workers are the parallelism, and OpenCV's threads don't survive fork
        chain = _CHAINS[self.name](self)
        if self.policy != "none":
            chain.append(Drawn(POLICIES[self.policy](self.image_size)))
        if self.erasing:
            chain.append(Drawn(erase, p=self.erasing))
        return chain


def _light(settings: Augmentation) -> list[Transform]:
    pixels = round(settings.padding * settings.image_size)
    return [ShiftAndFlip(pixels, flip=settings.flip)]


def _augmix(settings: Augmentation) -> list[Transform]:
    return [*_light(settings), AugMix()]


def _random_crop(settings: Augmentation) -> Transform:
    size = (settings.image_size, settings.image_size)
    return RandomCrop(size=size, scale=(settings.min_scale, 1.0))


def _imagenet(settings: Augmentation) -> list[Transform]:
    return [_random_crop(settings), *([A.HorizontalFlip(p=0.5)] if settings.flip else [])]


def _challenge(settings: Augmentation) -> list[Transform]:
    operations = challenge_operations(settings.image_size)
    kept = [each for name, each in operations.items() if settings.flip or name not in FLIPS]
    return [_random_crop(settings), *kept]


_CHAINS: dict[str, Callable[[Augmentation], list[Transform]]] = {
    "none": lambda _: [],
    "light": _light,
    "augmix": _augmix,
    "imagenet": _imagenet,
    "challenge": _challenge,
}
AUGMENTATIONS = tuple(_CHAINS)
