"""RandAugment, TrivialAugment and random erasing as functions of (image, rng).

timm and torchvision have them too, drawn from the process's global state. As theirs, the operations
are Pillow's. Images are uint8 (H, W, 3), RGB.
"""

from collections.abc import Callable, Mapping
from math import ceil, exp, log

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MEAN, DEVIATION = (124, 116, 104), (58, 57, 57)
"""ImageNet's, of each channel, 0 to 255."""
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
"""Of random erasing: share of the image's area, and height / width."""

Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Levels = Mapping[str, tuple[float, float]]
"""By operation, its value at strength 0, and by how much strength 1 changes it."""

_BICUBIC = Image.Resampling.BICUBIC
_FACTORS = ("color", "contrast", "brightness", "sharpness")
_SHEARS, _SHIFTS = ("shear_x", "shear_y"), ("translate_x", "translate_y")
SIGNED = {"rotate", *_FACTORS, *_SHEARS, *_SHIFTS}
"""Operations that go in either direction, equally often."""


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Take the pixel (x, y) from matrix (x, y, 1)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, _BICUBIC, fillcolor=MEAN)


def _solarize_add(image: Image.Image, added: float) -> Image.Image:
    """Brighten the dark half of the levels."""
    levels = [min(255, level + int(added)) if level < 128 else level for level in range(256)]
    return image.point(levels * 3)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "posterize": lambda image, bits: ImageOps.posterize(image, max(1, ceil(bits))),
    "solarize": lambda image, threshold: ImageOps.solarize(image, ceil(threshold)),
    "solarize_add": _solarize_add,
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "rotate": lambda image, degrees: image.rotate(degrees, _BICUBIC, fillcolor=MEAN),
    "shear_x": lambda image, slope: _affine(image, (1, slope, 0, 0, 1, 0)),
    "shear_y": lambda image, slope: _affine(image, (1, 0, 0, slope, 1, 0)),
    "translate_x": lambda image, pixels: _affine(image, (1, 0, pixels, 0, 1, 0)),
    "translate_y": lambda image, pixels: _affine(image, (1, 0, 0, 0, 1, pixels)),
}
"""Pillow's, of an RGB image and a value; where the argument is `_`, it counts for nothing."""


def randaugment_levels(side: int) -> Levels:
    """timm's 15 operations of `inc1`, for images of this side in pixels; strength 1 is its m10."""
    return {
        **dict.fromkeys(("auto_contrast", "equalize", "invert"), (0, 0)),
        "posterize": (4, -4),
        "solarize": (256, -256),
        "solarize_add": (0, 110),
        **dict.fromkeys(_FACTORS, (1, 0.9)),
        "rotate": (0, 30),
        **dict.fromkeys(_SHEARS, (0, 0.3)),
        **dict.fromkeys(_SHIFTS, (0, 0.45 * side)),
    }


TRIVIALAUGMENT_LEVELS: Levels = {
    **dict.fromkeys(("identity", "auto_contrast", "equalize"), (0, 0)),
    "posterize": (7.5, -6),  # 8 to 2, rounded
    "solarize": (255, -255),
    **dict.fromkeys(_FACTORS, (1, 0.99)),
    "rotate": (0, 135),
    **dict.fromkeys(_SHEARS, (0, 0.99)),
    **dict.fromkeys(_SHIFTS, (0, 32)),
}
"""The paper's wide set of 14 operations; shifts are of pixels, whatever the image's size."""


def at_strength(levels: Levels, name: str, strength: float) -> Draw:
    """An operation at a strength from 0 to 1, as a function of (image, rng)."""
    (start, change), operation = levels[name], OPERATIONS[name]

    def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        backwards = name in SIGNED and rng.random() < 0.5
        value = start + (-strength if backwards else strength) * change
        return np.array(operation(Image.fromarray(image), value))

    return augment


def randaugment(side: int) -> Draw:
    """RandAugment (Cubuk et al. 2020) as timm's `rand-m9-mstd0.5-inc1`.

    Two operations of 15, each applied with probability 0.5, at a strength from a normal
    distribution of mean 0.9 and deviation 0.05, clipped to 0 to 1. Images are `side` pixels wide.
    """
    levels = randaugment_levels(side)
    names = list(levels)

    def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for choice in rng.integers(len(names), size=2):
            if rng.random() < 0.5:
                strength = min(max(rng.normal(0.9, 0.05), 0), 1)
                image = at_strength(levels, names[choice], strength)(image, rng)
        return image

    return augment


def trivialaugment(_: int) -> Draw:
    """TrivialAugment (Müller & Hutter 2021): one operation of 14 at one of 31 strengths, 0 to 1."""
    levels = TRIVIALAUGMENT_LEVELS
    names = list(levels)

    def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        choice, place = rng.integers((len(names), 31))
        return at_strength(levels, names[choice], place / 30)(image, rng)

    return augment


POLICIES: dict[str, Callable[[int], Draw]] = {
    "randaugment": randaugment,
    "trivialaugment": trivialaugment,
}
"""By name, the policy for images of a side in pixels."""


def erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random erasing (Zhong et al. 2020) as timm's mode `pixel`: a box of normal noise.

    The noise has ImageNet's mean and deviation, as timm's has after normalisation. The box is drawn
    anew until it is smaller than the image; after ten draws that are not, nothing is erased.
    """
    height, width = image.shape[:2]
    low, high = map(log, ERASED_ASPECT)
    for _ in range(10):
        area, aspect = rng.uniform(*ERASED_AREA) * height * width, exp(rng.uniform(low, high))
        box = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if box[0] < height and box[1] < width:
            top = int(rng.integers(height - box[0] + 1))
            left = int(rng.integers(width - box[1] + 1))
            noise = rng.standard_normal((*box, 3), np.float32) * np.array(DEVIATION) + MEAN
            erased = image.copy()
            erased[top : top + box[0], left : left + box[1]] = noise.clip(0, 255).round()
            return erased
    return image
