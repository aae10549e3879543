"""Common corruptions in five severities, named as in ImageNet-C.

Of the 15 corruptions of Hendrycks & Dietterich (2019, arXiv 1903.12261), frost is left out, because
it needs photographs of frost. Their four extra ones are here, and rain is added. Those of
`imagenet_c` are theirs; the others are albumentations', at their severities where it has the same
parameter; motion_blur, snow, rain, spatter and elastic_transform are graded anew. Scores therefore
do not compare with published ones, only with each other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch import Tensor

from robust_submission.cli.errors import UserError
from robust_submission.data.corruptions.imagenet_c import fog, glass_blur, shot_noise

if TYPE_CHECKING:
    import albumentations

FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("gaussian_blur", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "fog", "brightness", "rain", "spatter"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
}
CORRUPTIONS: tuple[str, ...] = tuple(name for family in FAMILIES.values() for name in family)
SEVERITIES = (1, 2, 3, 4, 5)

WORKING_SIZE = 224
"""Blurs, weather and warps are sized in pixels of an image with this shorter side: a smaller image
is enlarged for them and brought back, so that a severity means the same share of any image."""

_SCALED = {*FAMILIES["blur"], "snow", "rain", "spatter", "elastic_transform"}


@dataclass(frozen=True)
class Graded:
    """A transform of albumentations whose arguments depend on a severity from 1 to 5."""

    transform: str
    """Its name in albumentations, which is imported at the first use: it takes seconds."""
    ranges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Arguments that are a range (low, high) to draw from: one value per severity."""
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Arguments that are a single value: one per severity."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that are the same at every severity."""

    def at(self, severity: int, **others: Any) -> "albumentations.BasicTransform":
        """The transform at one severity; `others` are further arguments."""
        values = {name: each[severity - 1] for name, each in self.values.items()}
        return self._build(severity, severity, **values, **others)

    def between(self, mildest: int = 1, strongest: int = 5) -> "albumentations.BasicTransform":
        """The transform drawn anew for each image, from the range between two severities."""
        assert not self.values, f"{self.transform}: {[*self.values]} cannot be drawn"
        return self._build(mildest, strongest)

    def _build(
        self, mildest: int, strongest: int, **others: Any
    ) -> "albumentations.BasicTransform":
        import albumentations

        parts = {name: each[mildest - 1 : strongest] for name, each in self.ranges.items()}
        spans = {name: (min(part), max(part)) for name, part in parts.items()}
        return getattr(albumentations, self.transform)(**spans, **self.fixed, **others)


def _graded_color(**factors: Sequence[float]) -> Graded:
    unchanged = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    fixed = {name: each for name, each in unchanged.items() if name not in factors}
    return Graded("ColorJitter", factors, fixed=fixed)


# A uniform factor of these standard deviations.
_SPECKLE = [3**0.5 * deviation for deviation in (0.15, 0.2, 0.35, 0.45, 0.6)]
_INTERPOLATIONS = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_NEAREST_EXACT}

GRADED: dict[str, Graded] = {
    "gaussian_noise": Graded("GaussNoise", {"std_range": (0.08, 0.12, 0.18, 0.26, 0.38)}),
    "impulse_noise": Graded(
        "SaltAndPepper",
        {"amount": (0.03, 0.06, 0.09, 0.17, 0.27)},
        fixed={"salt_vs_pepper": (0.5, 0.5)},
    ),
    "speckle_noise": Graded(
        "MultiplicativeNoise",
        values={"multiplier": [(max(0, 1 - spread), 1 + spread) for spread in _SPECKLE]},
        fixed={"per_channel": True, "elementwise": True},
    ),
    "gaussian_blur": Graded("GaussianBlur", {"sigma_limit": (1, 2, 3, 4, 6)}),
    "defocus_blur": Graded(
        "Defocus", {"radius": (3, 4, 6, 8, 10), "alias_blur": (0.1, 0.5, 0.5, 0.5, 0.5)}
    ),
    "motion_blur": Graded(
        "MotionBlur", {"blur_limit": (9, 13, 17, 23, 29)}, fixed={"allow_shifted": False}
    ),
    "zoom_blur": Graded(
        "ZoomBlur",
        {
            "max_factor": (1.11, 1.16, 1.21, 1.26, 1.31),
            "step_factor": (0.01, 0.01, 0.02, 0.02, 0.03),
        },
    ),
    "snow": Graded("RandomSnow", {"snow_point_range": (0.1, 0.2, 0.3, 0.4, 0.5)}),
    "brightness": Graded(
        "RandomBrightnessContrast",
        {"brightness_limit": (0.1, 0.2, 0.3, 0.4, 0.5)},
        fixed={"contrast_limit": (0, 0)},
    ),
    "rain": Graded(
        "RandomRain",
        values={
            "drop_length": (8, 12, 16, 20, 24),
            "blur_value": (1, 3, 3, 5, 7),
            "brightness_coefficient": (0.95, 0.9, 0.8, 0.7, 0.6),
        },
    ),
    "spatter": Graded(
        "Spatter",
        {
            "cutout_threshold": (0.74, 0.7, 0.67, 0.69, 0.66),
            "intensity": (0.6, 0.6, 0.6, 0.7, 0.7),
        },
        values={"mode": ("rain", "rain", "rain", "mud", "mud")},  # as ImageNet-C
    ),
    "contrast": _graded_color(contrast=(0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Graded(
        "ElasticTransform",
        values={"alpha": (12, 24, 36, 48, 60)},
        fixed={"sigma": 3, "noise_distribution": "uniform"},
    ),
    "pixelate": Graded(
        "Downscale",
        {"scale_range": (0.6, 0.5, 0.4, 0.3, 0.25)},
        fixed={"interpolation_pair": _INTERPOLATIONS},
    ),
    "jpeg_compression": Graded("ImageCompression", {"quality_range": (25, 18, 15, 10, 7)}),
    "saturate": _graded_color(saturation=(0.3, 0.1, 2, 5, 20)),
}
"""albumentations' transforms, whose severities the challenge's augmentations take from here too."""
IMAGENET_C = {"shot_noise": shot_noise, "fog": fog, "glass_blur": glass_blur}
"""Functions of (image, rng, severity): the other corruptions."""


@cache
def _transform_at(name: str, severity: int) -> "albumentations.BasicTransform":
    return GRADED[name].at(severity, p=1)


def _at_working_size(corrupt: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = WORKING_SIZE / min(height, width)
    if scale <= 1:
        return corrupt(image)
    size = (round(width * scale), round(height * scale))
    large = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    return cv2.resize(corrupt(large), (width, height), interpolation=cv2.INTER_AREA)


def corruption_names(names: Sequence[str]) -> tuple[str, ...]:
    """The corruptions that a user names, each once, in the order of `CORRUPTIONS`; "all" is all.

    Raises:
        UserError: an unknown name.
    """
    if unknown := [name for name in names if name not in ("all", *CORRUPTIONS)]:
        known = ", ".join(CORRUPTIONS)
        raise UserError(f"corruptions: expected all, or some of {known}, found {unknown[0]!r}.")
    return tuple(name for name in CORRUPTIONS if name in names or "all" in names)


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One corruption at one severity."""

    name: str
    """One of `CORRUPTIONS`."""
    severity: int = 3
    """From 1, mild, to 5."""

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            known = ", ".join(CORRUPTIONS)
            raise UserError(f"corruption: expected one of {known}, found {self.name!r}.")
        if self.severity not in SEVERITIES:
            raise UserError(f"severity: expected 1 to 5, found {self.severity}.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Corrupt one image, as a function of the two arguments alone.

        Args:
            image: uint8 (H, W, 3), RGB; left as it is.
            rng: All randomness comes from it.

        Returns:
            uint8 (H, W, 3), RGB.
        """

        def corrupt(pixels: np.ndarray) -> np.ndarray:
            if function := IMAGENET_C.get(self.name):
                return function(pixels, rng, self.severity)
            transform = _transform_at(self.name, self.severity)
            transform.set_random_seed(int(rng.integers(2**32)))
            return transform(image=pixels)["image"]

        return _at_working_size(corrupt, image) if self.name in _SCALED else corrupt(image)

    def seeds(self, seed: int, indices: Iterable[int]) -> Tensor:
        """One seed per image for `batch`: a function of (seed, index, name, severity) alone.

        Args:
            seed: The seed of the whole evaluation, 0 or more.
            indices: The images' places in their data source.

        Returns:
            int64 (B,).
        """
        name = int.from_bytes(self.name.encode(), "big")
        states = [
            np.random.SeedSequence([seed, int(index), name, self.severity]).generate_state(1)[0]
            for index in indices
        ]
        return torch.tensor([int(state) for state in states], dtype=torch.int64)

    def batch(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Corrupt a batch, each image by its own seed whatever the others are.

        Args:
            images: float32 (B, 3, H, W), RGB, 0 to 1; rounded to 8 bits.
            seeds: int64 (B,), one per image.

        Returns:
            float32 (B, 3, H, W), RGB, 0 to 1, on the device of `images`.
        """
        if len(images) == 0:
            return images.detach().clone()
        pixels = (images.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        corrupted = [
            self(np.ascontiguousarray(image), np.random.default_rng(seed))
            for image, seed in zip(pixels, seeds.tolist(), strict=True)
        ]
        changed = torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2)
        return (changed.to(images.device).float() / 255).contiguous()
