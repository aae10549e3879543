"""The augmentations as chains of albumentations' transforms; its import takes seconds."""

from collections.abc import Callable
from typing import Any

import albumentations as A
import cv2
import numpy as np

from robust_submission.data.augment import Augmentation
from robust_submission.data.challenge_operations import FLIPS, Transform, challenge_operations


class AugMix(A.ImageOnlyTransform):
    """An image mixed with chains of mild changes (Hendrycks et al. 2020, arXiv 1912.02781).

    (1 - m) image + m (w_1 chain_1(image) + w_2 ... + w_3 ...), w from Dirichlet(1, 1, 1), m from
    Beta(1, 1); a chain is one to three operations, none of them a test corruption, at the paper's
    severity 3. Its consistency loss is no part of an augmentation. Images are uint8 (H, W, 3), RGB.
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
        """Mix: a mean of values from 0 to 255 stays among them."""
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


def _flip(settings: Augmentation) -> list[Transform]:
    return [A.HorizontalFlip(p=0.5)] if settings.flip else []


def _light(settings: Augmentation) -> list[Transform]:
    pixels = round(settings.padding * settings.image_size)
    return [
        A.Pad(padding=pixels, border_mode=cv2.BORDER_REFLECT_101),
        A.RandomCrop(settings.image_size, settings.image_size),
        *_flip(settings),
    ]


def _augmix(settings: Augmentation) -> list[Transform]:
    return [*_light(settings), AugMix()]


def _random_crop(settings: Augmentation) -> Transform:
    return A.RandomResizedCrop(
        size=(settings.image_size, settings.image_size),
        scale=(settings.min_scale, 1.0),
        interpolation=cv2.INTER_CUBIC,
        area_for_downscale="image",
    )


def _imagenet(settings: Augmentation) -> list[Transform]:
    return [_random_crop(settings), *_flip(settings)]


def _challenge(settings: Augmentation) -> list[Transform]:
    resize = A.SmallestMaxSize(
        max_size=round(settings.image_size * 256 / 224),
        interpolation=cv2.INTER_CUBIC,
        area_for_downscale="image",
    )
    operations = challenge_operations(settings.image_size)
    kept = [each for name, each in operations.items() if settings.flip or name not in FLIPS]
    return [resize, _random_crop(settings), *kept]


_CHAINS: dict[str, Callable[[Augmentation], list[Transform]]] = {
    "light": _light,
    "augmix": _augmix,
    "imagenet": _imagenet,
    "challenge": _challenge,
}


def compose(settings: Augmentation) -> A.Compose:
    """The chain of transforms of `settings.name`, any but none."""
    cv2.setNumThreads(0)  # workers are the parallelism, and OpenCV's threads don't survive fork
    return A.Compose(_CHAINS[settings.name](settings))
