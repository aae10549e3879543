"""The 32 operations with which the challenge's 2nd place augmented, through albumentations.

Strengths are those of github.com/ForeverPs/Robust-Classification, data_aug.py (for most, the range
of ImageNet-C's five severities), here drawn anew for every image. Four operations have no twin in
albumentations and are functions below: extend, block_shuffle, random_padding and frost. Some twins
do it another way: impulse noise falls on whole pixels, fog is made of circles, and snow lies on the
dark parts. Rain, fog, snow, spatter and elastic are graded anew.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import albumentations as A
import cv2
import numpy as np

FULL_SIZE = 224
"""Side of the images that lengths in pixels are meant for."""

FLIPS = ("horizontal_flip", "vertical_flip")
ICE = (215, 235, 255)

Transform = A.BasicTransform | A.BaseCompose


class Drawn(A.ImageOnlyTransform):
    """A function of (image, rng) as a transform; images are uint8 (H, W, 3), RGB."""

    def __init__(
        self, function: Callable[[np.ndarray, np.random.Generator], np.ndarray], p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.function = function

    def apply(self, img: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
        """Apply the function with the transform's own random state."""
        return self.function(img, self.random_generator)


def extend(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smear: each pixel takes the value of one a few pixels below and to the right of it."""
    height, width = image.shape[:2]
    down, right = rng.integers(0, rng.integers(3, 10), size=(2, height, width))
    rows = np.minimum(np.arange(height)[:, None] + down, height - 1)
    return image[rows, np.minimum(np.arange(width) + right, width - 1)]


def block_shuffle(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut the image in two near its middle, along either axis, and swap the parts."""
    axis = int(rng.integers(2))
    return np.roll(image, round(rng.uniform(0.4, 0.6) * image.shape[axis]), axis)


def random_padding(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shrink the image to 65 to 95 % and lay it anywhere on a ground of one grey or of noise."""
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
    """Dim the image and add needles of ice in their haze, in ImageNet-C's five proportions.

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


def _one_of(kind: Callable[..., A.BasicTransform], **grades: Sequence[Any]) -> A.OneOf:
    """For settings that a transform keeps for good: a transform for each grade, one is drawn."""
    rows = zip(*grades.values(), strict=True)
    return A.OneOf([kind(**dict(zip(grades, row, strict=True))) for row in rows])


def _color(**factors: tuple[float, float]) -> A.ColorJitter:
    unchanged = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    return A.ColorJitter(**{**unchanged, **factors})


def _noise() -> dict[str, Transform]:
    spreads = [3**0.5 * std for std in (0.15, 0.2, 0.35, 0.45, 0.6)]  # a uniform factor of that std
    colors = ((0, 255, 0), (255, 0, 0), (0, 0, 255), None)  # None: any one
    return {
        "pepper_salt_noise": A.SaltAndPepper(amount=(0.005, 0.02)),
        "color_point_noise": A.Sequential(
            [A.PixelDropout(dropout_prob=0.0025, drop_value=color, p=1) for color in colors]
        ),
        "gaussian_noise": A.GaussNoise(std_range=(0.01, 0.15)),
        "shot_noise": A.ShotNoise(scale_range=(1 / 60, 1 / 3)),
        "impulse_noise": A.SaltAndPepper(amount=(0.03, 0.27), salt_vs_pepper=(0.5, 0.5)),
        "speckle_noise": _one_of(
            partial(A.MultiplicativeNoise, per_channel=True, elementwise=True),
            multiplier=[(max(0, 1 - spread), 1 + spread) for spread in spreads],
        ),
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
        "gaussian_blur": A.GaussianBlur(sigma_limit=(1, 2)),
        "box_blur": A.Blur(blur_limit=(3, 7)),
        "glass_blur": _one_of(
            A.GlassBlur,
            sigma=(0.7, 0.9, 1, 1.1, 1.5),
            max_delta=(1, 2, 2, 3, 4),
            iterations=(2, 1, 3, 2, 2),
        ),
        "defocus_blur": A.Defocus(radius=(3, 10), alias_blur=(0.1, 0.5)),
        "motion_blur": A.MotionBlur(blur_limit=(9, 29), allow_shifted=False),
        "zoom_blur": A.ZoomBlur(max_factor=(1.11, 1.31), step_factor=(0.01, 0.03)),
    }


def _weather() -> dict[str, Transform]:
    water = A.Spatter(cutout_threshold=(0.66, 0.74), color=(175, 238, 238))
    mud = A.Spatter(cutout_threshold=(0.66, 0.69), mode="mud", color=(63, 42, 20))
    return {
        "rain": _one_of(
            A.RandomRain,
            drop_length=(12, 16, 20, 24, 28),
            blur_value=(1, 3, 3, 3, 5),
            brightness_coefficient=(0.95, 0.9, 0.85, 0.8, 0.7),
        ),
        "fog": A.RandomFog(fog_coef_range=(0.5, 1)),
        "frost": Drawn(frost),
        "snow": A.RandomSnow(snow_point_range=(0.1, 0.5)),
        "spatter": A.OneOf([water, mud]),
    }


def _digital() -> dict[str, Transform]:
    return {
        "contrast": _color(contrast=(0.05, 0.4)),
        "brightness": A.RandomBrightnessContrast(brightness_limit=(0.1, 0.5), contrast_limit=0),
        "saturation": A.OneOf([_color(saturation=(0.1, 0.3)), _color(saturation=(2, 20))]),
        "jpeg_compression": A.ImageCompression(quality_range=(7, 25)),
        "pixelation": A.Downscale(
            scale_range=(0.25, 0.6),
            interpolation_pair={
                "downscale": cv2.INTER_AREA,
                "upscale": cv2.INTER_NEAREST_EXACT,
            },
        ),
    }


def _warp() -> dict[str, Transform]:
    return {
        "extend": Drawn(extend),
        "elastic": _one_of(
            partial(
                A.ElasticTransform,
                sigma=3,
                noise_distribution="uniform",
                border_mode=cv2.BORDER_REFLECT_101,
            ),
            alpha=(12, 24, 36, 48, 60),
        ),
    }


def _enlarged(transform: Transform, image_size: int) -> A.Sequential:
    """Transform a small image enlarged, and bring it back.

    Blurs, weather and warps are sized in pixels. The same number of pixels would leave nothing of
    an image of 32, and of the same share of the image nothing would be seen: the geometric mean of
    the two sizes lies between.
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
            that they take and give.
        p: From 0 to 1.
    """
    in_pixels = {**_blur(), **_weather(), **_warp()}
    if image_size < FULL_SIZE:
        in_pixels = {name: _enlarged(each, image_size) for name, each in in_pixels.items()}
    operations = {**_noise(), **_layout(), **in_pixels, **_digital()}
    for operation in operations.values():
        operation.p = p
    return operations
