"""The 32 augmentations of the challenge's 2nd place, through albumentations.

Strengths are those of github.com/ForeverPs/Robust-Classification, data_aug.py, drawn anew for every
image; most are the range of a corruption's five severities. shot_noise, fog and glass_blur are
ImageNet-C's own. Five operations are missing from albumentations, or slow there, and are functions
here: color_points, extend, block_shuffle, random_padding and frost. Some others differ in kind:
impulse noise hits whole pixels, and snow lies on the dark parts. Rain, snow, spatter and elastic
are graded anew.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import albumentations as A
import cv2
import numpy as np

from robust_submission.data.corruptions import GRADED, IMAGENET_C, SEVERITIES, Graded
from robust_submission.data.corruptions.imagenet_c import take_pixels

FULL_SIZE = 224
"""Side of the images that lengths in pixels are meant for."""

FLIPS = ("horizontal_flip", "vertical_flip")
POINTS, POINT_COLORS = 0.01, ((0, 255, 0), (255, 0, 0), (0, 0, 255))
ICE = (215, 235, 255)
_RAIN = Graded(
    "RandomRain",
    values={
        "drop_length": (12, 16, 20, 24, 28),
        "blur_value": (1, 3, 3, 3, 5),
        "brightness_coefficient": (0.95, 0.9, 0.85, 0.8, 0.7),
    },
)

Transform = A.BasicTransform | A.BaseCompose


class Drawn(A.ImageOnlyTransform):
    """A function of (image, rng) as albumentations' transform; images are uint8 (H, W, 3), RGB."""

    def __init__(
        self, function: Callable[[np.ndarray, np.random.Generator], np.ndarray], p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.function = function

    def apply(self, img: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
        """Apply the function with the transform's own random state."""
        return self.function(img, self.random_generator)


def color_points(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Replace one pixel in a hundred by green, red, blue or any color, equally often."""
    points = np.flatnonzero(rng.random(image.shape[0] * image.shape[1], np.float32) < POINTS)
    kinds = rng.integers(len(POINT_COLORS) + 1, size=len(points))
    colors = rng.integers(0, 256, (len(points), 3), np.uint8)
    for kind, color in enumerate(POINT_COLORS):
        colors[kinds == kind] = color
    changed = image.copy()
    changed.reshape(-1, 3)[points] = colors
    return changed


def extend(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smear: each pixel takes the value of another one, a few pixels below it and to its right."""
    height, width = image.shape[:2]
    down, right = rng.integers(0, rng.integers(3, 10), size=(2, height, width))
    rows = np.minimum(np.arange(height)[:, None] + down, height - 1)
    return take_pixels(image, rows, np.minimum(np.arange(width) + right, width - 1))


def block_shuffle(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut the image in two near its middle, along a random axis, and swap the parts."""
    axis = int(rng.integers(2))
    return np.roll(image, round(rng.uniform(0.4, 0.6) * image.shape[axis]), axis)


def random_padding(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shrink the image to 65 to 95 % and paste it anywhere on a plain grey or noise background."""
    height, width = image.shape[:2]
    scale = rng.uniform(0.65, 0.95)
    size = (int(scale * width), int(scale * height))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    grey = rng.integers(2) == 0
    padded = rng.integers(0, 256, 1 if grey else image.shape, np.uint8) * np.ones_like(image)
    top = rng.integers(height - small.shape[0] + 1)
    left = rng.integers(width - small.shape[1] + 1)
    padded[top : top + small.shape[0], left : left + small.shape[1]] = small
    return padded


def frost(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dim the image and add hazy needles of ice, in ImageNet-C's five proportions.

    ImageNet-C takes the ice from photographs; here it is drawn.
    """
    height, width = image.shape[:2]
    count = rng.integers(2 * width // 3, 2 * width)
    angles, lengths = rng.uniform(0, 2 * np.pi, count), rng.exponential(0.15, count)
    starts = rng.uniform(0, 1, (count, 2))
    ends = starts + lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    needles = (np.stack([starts, ends], axis=1) * (width, height)).astype(np.int32)
    ice = np.zeros((height, width), np.uint8)
    cv2.polylines(ice, list(needles), False, 255, 1, cv2.LINE_AA)
    haze = cv2.GaussianBlur(ice, (0, 0), width / 40)
    shade = (0.6 / 255 * ice + 1.5 / 255 * haze).clip(0, 1)
    kept, added = rng.choice([(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)])
    return (kept * image + added * shade[..., None] * ICE).clip(0, 255).astype(np.uint8)


def _one_of(graded: Graded, **others: Any) -> A.OneOf:
    """For arguments that a transform keeps for good: one transform per severity, one is drawn."""
    return A.OneOf([graded.at(severity, **others) for severity in range(1, 6)])


def _any_severity(name: str) -> Transform:
    return Drawn(lambda image, rng: IMAGENET_C[name](image, rng, int(rng.choice(SEVERITIES))))


def _noise() -> dict[str, Transform]:
    return {
        "pepper_salt_noise": A.SaltAndPepper(amount=(0.005, 0.02)),
        "color_point_noise": Drawn(color_points),
        "gaussian_noise": A.GaussNoise(std_range=(0.01, 0.15)),
        "shot_noise": _any_severity("shot_noise"),
        "impulse_noise": GRADED["impulse_noise"].between(),
        "speckle_noise": _one_of(GRADED["speckle_noise"]),
    }


def _layout() -> dict[str, Transform]:
    side = (13 / FULL_SIZE, 26 / FULL_SIZE)
    patch = partial(
        A.CoarseDropout, num_holes_range=(1, 1), hole_height_range=side, hole_width_range=side
    )
    greys = [patch(fill=grey, p=0.1) for grey in (0, 127, 255)]
    return {
        "mosaic": A.OneOf([patch(fill="random", p=0.7), *greys]),
        "rgb_shuffle": A.ChannelShuffle(),
        "rotation": A.Rotate(limit=5),
        "horizontal_flip": A.HorizontalFlip(),
        "vertical_flip": A.VerticalFlip(),
        "block_shuffle": Drawn(block_shuffle),
        "local_shuffle": A.RandomGridShuffle(grid=(3, 3)),
        "random_padding": Drawn(random_padding),
    }


def _blur() -> dict[str, Transform]:
    return {
        "gaussian_blur": GRADED["gaussian_blur"].between(1, 2),
        "box_blur": A.Blur(blur_limit=(3, 7)),
        "glass_blur": _any_severity("glass_blur"),
        "defocus_blur": GRADED["defocus_blur"].between(),
        "motion_blur": GRADED["motion_blur"].between(),
        "zoom_blur": GRADED["zoom_blur"].between(),
    }


def _weather() -> dict[str, Transform]:
    water = A.Spatter(cutout_threshold=(0.66, 0.74), color=(175, 238, 238))
    mud = A.Spatter(cutout_threshold=(0.66, 0.69), mode="mud", color=(63, 42, 20))
    return {
        "rain": _one_of(_RAIN),
        "fog": _any_severity("fog"),
        "frost": Drawn(frost),
        "snow": GRADED["snow"].between(),
        "spatter": A.OneOf([water, mud]),
    }


def _digital() -> dict[str, Transform]:
    saturate = GRADED["saturate"]  # two severities fade, three glare
    return {
        "contrast": GRADED["contrast"].between(),
        "brightness": GRADED["brightness"].between(),
        "saturation": A.OneOf([saturate.between(1, 2), saturate.between(3, 5)]),
        "jpeg_compression": GRADED["jpeg_compression"].between(),
        "pixelation": GRADED["pixelate"].between(),
    }


def _warp() -> dict[str, Transform]:
    elastic = _one_of(GRADED["elastic_transform"], border_mode=cv2.BORDER_REFLECT_101)
    return {"extend": Drawn(extend), "elastic": elastic}


def _enlarged(transform: Transform, image_size: int) -> A.Sequential:
    """Enlarge a small image for the transform, and bring it back.

    Blurs, weather and warps are sized in pixels. At their full number of pixels nothing of a 32 px
    image would remain; scaled down with the image they would not be visible. The enlarged side is
    in between: the geometric mean of the two sizes. Fog alone is alike at every size.
    """
    transform.p = 1
    side = round((FULL_SIZE * image_size) ** 0.5)
    larger = A.Resize(side, side, interpolation=cv2.INTER_CUBIC)
    return A.Sequential(
        [larger, transform, A.Resize(image_size, image_size, interpolation=cv2.INTER_AREA)]
    )


def challenge_operations(image_size: int, p: float = 0.05) -> dict[str, Transform]:
    """The 32 operations by name, each applied with probability `p`.

    Args:
        image_size: Side in pixels of the square images, uint8 (image_size, image_size, 3) RGB,
            that go in and come out.
        p: From 0 to 1.
    """
    in_pixels = {**_blur(), **_weather(), **_warp()}
    if image_size < FULL_SIZE:
        in_pixels = {
            name: each if name == "fog" else _enlarged(each, image_size)
            for name, each in in_pixels.items()
        }
    operations = {**_noise(), **_layout(), **in_pixels, **_digital()}
    for operation in operations.values():
        operation.p = p
    return operations
