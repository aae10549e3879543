"""Common corruptions in five severities, through albumentations, named as in ImageNet-C.

Of the 15 of Hendrycks & Dietterich (2019) `frost` has no twin here: it needs photographs of frost.
Of their four extra ones all are here, and rain comes on top. Severities are those of ImageNet-C
where the two programs share a parameter; motion_blur, snow, fog, rain, spatter and
elastic_transform are graded anew. So scores do not compare with published ones, only among
themselves.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from robust_submission.attacks.base import (
    Model,
    check_at_least,
    check_batch,
    check_choice,
    image_seeds,
)
from robust_submission.cli.errors import UserError

FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("gaussian_blur", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "fog", "brightness", "rain", "spatter"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
}
CORRUPTIONS: tuple[str, ...] = tuple(name for family in FAMILIES.values() for name in family)

WORKING_SIZE = 224
"""Blurs, weather and warps are sized in pixels of an image with this shorter side: a smaller image
is enlarged for them and brought back, so that a severity means the same share of any image."""

_SCALED = {*FAMILIES["blur"], "snow", "fog", "rain", "spatter", "elastic_transform"}


def _twice(value: float) -> tuple[float, float]:
    """A range of one value: the severity fixes it."""
    return (value, value)


def _color(**factors: tuple[float, float]) -> dict[str, Any]:
    unchanged = {"brightness": _twice(1), "contrast": _twice(1), "saturation": _twice(1)}
    return {**unchanged, "hue": _twice(0), **factors}


def _noise_and_blur(index: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Severity, from 0, to the transform and its settings."""
    spread = 3**0.5 * (0.15, 0.2, 0.35, 0.45, 0.6)[index]  # a uniform factor of that deviation
    sigma, delta, iterations = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[
        index
    ]
    length = (9, 13, 17, 23, 29)[index]
    return {
        "gaussian_noise": (
            "GaussNoise",
            {"std_range": _twice((0.08, 0.12, 0.18, 0.26, 0.38)[index])},
        ),
        "shot_noise": ("ShotNoise", {"scale_range": _twice(1 / (60, 25, 12, 5, 3)[index])}),
        "impulse_noise": (
            "SaltAndPepper",
            {"amount": _twice((0.03, 0.06, 0.09, 0.17, 0.27)[index]), "salt_vs_pepper": (0.5, 0.5)},
        ),
        "speckle_noise": (
            "MultiplicativeNoise",
            {
                "multiplier": (max(0, 1 - spread), 1 + spread),
                "per_channel": True,
                "elementwise": True,
            },
        ),
        "gaussian_blur": ("GaussianBlur", {"sigma_limit": _twice((1, 2, 3, 4, 6)[index])}),
        "defocus_blur": (
            "Defocus",
            {
                "radius": _twice((3, 4, 6, 8, 10)[index]),
                "alias_blur": _twice((0.1, *4 * [0.5])[index]),
            },
        ),
        "glass_blur": ("GlassBlur", {"sigma": sigma, "max_delta": delta, "iterations": iterations}),
        "motion_blur": ("MotionBlur", {"blur_limit": _twice(length), "allow_shifted": False}),
        "zoom_blur": (
            "ZoomBlur",
            {
                "max_factor": _twice((1.11, 1.16, 1.21, 1.26, 1.31)[index]),
                "step_factor": _twice((0.01, 0.01, 0.02, 0.02, 0.03)[index]),
            },
        ),
    }


def _weather_and_digital(index: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Severity, from 0, to the transform and its settings."""
    brightness = (0.1, 0.2, 0.3, 0.4, 0.5)[index]
    spatter = {
        "mean": _twice(0.65),
        "std": _twice(0.3),
        "cutout_threshold": _twice((0.74, 0.7, 0.67, 0.69, 0.66)[index]),
        "intensity": _twice((0.6, 0.6, 0.6, 0.7, 0.7)[index]),
        "mode": "rain" if index < 3 else "mud",  # as ImageNet-C: water, then mud
    }
    quality = (25, 18, 15, 10, 7)[index]
    return {
        "snow": (
            "RandomSnow",
            {"snow_point_range": _twice((0.1, 0.2, 0.3, 0.4, 0.5)[index]), "brightness_coeff": 2.5},
        ),
        "fog": ("RandomFog", {"fog_coef_range": _twice((0.2, 0.4, 0.6, 0.8, 1.0)[index])}),
        "brightness": (
            "RandomBrightnessContrast",
            {"brightness_limit": _twice(brightness), "contrast_limit": _twice(0)},
        ),
        "rain": (
            "RandomRain",
            {
                "drop_length": (8, 12, 16, 20, 24)[index],
                "blur_value": (1, 3, 3, 5, 7)[index],
                "brightness_coefficient": (0.95, 0.9, 0.8, 0.7, 0.6)[index],
            },
        ),
        "spatter": ("Spatter", spatter),
        "contrast": ("ColorJitter", _color(contrast=_twice((0.4, 0.3, 0.2, 0.1, 0.05)[index]))),
        "elastic_transform": (
            "ElasticTransform",
            {"alpha": (12, 24, 36, 48, 60)[index], "sigma": 3, "noise_distribution": "uniform"},
        ),
        "pixelate": (
            "Downscale",
            {
                "scale_range": _twice((0.6, 0.5, 0.4, 0.3, 0.25)[index]),
                "interpolation_pair": {
                    "downscale": cv2.INTER_AREA,
                    "upscale": cv2.INTER_NEAREST_EXACT,
                },
            },
        ),
        "jpeg_compression": ("ImageCompression", {"quality_range": (quality, quality)}),
        "saturate": ("ColorJitter", _color(saturation=_twice((0.3, 0.1, 2, 5, 20)[index]))),
    }


@cache
def _transform(name: str, severity: int) -> Any:
    # Must stand before the import: albumentations otherwise asks the network for a newer one.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    index = severity - 1
    kind, settings = {**_noise_and_blur(index), **_weather_and_digital(index)}[name]
    return getattr(albumentations, kind)(**settings, p=1)


def _at_working_size(corrupt: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = WORKING_SIZE / min(height, width)
    if scale <= 1:
        return corrupt(image)
    size = (round(width * scale), round(height * scale))
    large = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    return cv2.resize(corrupt(large), (width, height), interpolation=cv2.INTER_AREA)


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One corruption; as an attack on a batch, or with `corrupt` on an image."""

    name: str
    """One of `CORRUPTIONS`."""

    severity: int = 3
    """From 1, mild, to 5."""

    seed: int = 0
    """Of the random draws, where the call brings neither generator nor seeds."""

    def __post_init__(self) -> None:
        check_choice("name", self.name, CORRUPTIONS)
        check_at_least("seed", self.seed, 0)
        if self.severity not in range(1, 6):
            raise UserError(f"Expected a severity from 1 to 5. Received: {self.severity}.")

    def corrupt(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Corrupt one image: a function of its two arguments alone.

        Args:
            image: (H, W, 3), uint8, RGB.
            rng: Source of the draws.

        Returns:
            (H, W, 3), uint8, RGB.
        """
        transform = _transform(self.name, self.severity)
        transform.set_random_seed(int(rng.integers(2**32)))

        def apply(pixels: np.ndarray) -> np.ndarray:
            return transform(image=pixels)["image"]

        return _at_working_size(apply, image) if self.name in _SCALED else apply(image)

    def __call__(
        self,
        model: Model | None,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Corrupt a batch: see `Attack`. Asks the model nothing; rounds images to 8 bits."""
        check_batch(images, labels)
        if len(images) == 0:
            return images.detach().clone()
        if seeds is None and generator is not None:
            seeds = torch.randint(
                2**62, (len(images),), generator=generator, device=generator.device
            )
        if seeds is None:
            seeds = image_seeds(self.seed, range(len(images)))
        pixels = (images.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        corrupted = [
            self.corrupt(np.ascontiguousarray(image), np.random.default_rng(seed))
            for image, seed in zip(pixels, seeds.tolist(), strict=True)
        ]
        changed = torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2)
        return (changed.to(images.device).float() / 255).contiguous()
