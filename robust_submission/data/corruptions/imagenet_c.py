"""Corruptions of ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261) in its own definitions.

Functions of (image, rng, severity), with the five severities of the authors' code for 224 pixels.
Images are uint8 (H, W, 3), RGB, of any size, and stay as they are; as theirs, results are cut, not
rounded, to whole levels. albumentations' operations of these names differ in kind, and are slower.
"""

from functools import cache

import cv2
import numpy as np

PHOTONS = (60, 25, 12, 5, 3)
"""shot_noise: the mean number of photons that makes white."""
FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
"""fog: its brightness where it is thickest, in multiples of white, and its wibble decay."""
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
"""glass_blur: deviation of the blur in pixels, largest shift in pixels, number of shifts."""

_CELLS = 1024
_UNSURE = 255


def take_pixels(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The pixels at these places, as `image[rows, columns]` but several times as fast.

    Args:
        image: uint8 (H, W, C).
        rows: int, broadcast with `columns` to (H', W').
        columns: As `rows`.

    Returns:
        uint8 (H', W', C).
    """
    return image.reshape(-1, image.shape[2]).take(rows * image.shape[1] + columns, axis=0)


@cache
def _photon_counts(photons: int) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative probabilities of photon counts, and a guide to their inverse.

    Returns:
        float64 (256, photons): for each level, the probability of at most 0, 1, 2 … photons.
        uint8 (256, _CELLS): for each level and each cell of the unit interval, the count wherever
            in the cell a uniform variate falls; _UNSURE where two counts meet.
    """
    means = np.arange(256)[:, None] * photons / 255
    ratios = np.hstack([np.exp(-means), means / np.arange(1, photons)])
    cumulative = np.cumsum(np.cumprod(ratios, axis=1), axis=1)
    edges = np.arange(_CELLS + 1) / _CELLS
    first = [np.searchsorted(each, edges[:-1], "right") for each in cumulative]
    last = [np.searchsorted(each, edges[1:], "left") for each in cumulative]
    return cumulative, np.where(np.equal(first, last), first, _UNSURE).astype(np.uint8)


def shot_noise(image: np.ndarray, rng: np.random.Generator, severity: int) -> np.ndarray:
    """A Poisson number of photons for each value, with the value as its mean.

    By inverting the distribution function: the number of cumulative probabilities up to a uniform
    variate. Ten bits of the variate nearly always tell; where they do not, the rest is drawn.
    """
    photons = PHOTONS[severity - 1]
    cumulative, guide = _photon_counts(photons)
    levels, cells = image.ravel(), rng.integers(_CELLS, size=image.size, dtype=np.uint16)
    counts = guide.ravel().take(levels * np.int32(_CELLS) + cells)
    unsure = np.flatnonzero(counts == _UNSURE)
    uniform = (cells[unsure] + rng.random(len(unsure))) / _CELLS
    counts[unsure] = (cumulative[levels[unsure]] <= uniform[:, None]).sum(axis=1)
    brightness = (np.arange(photons + 1) * 255 / photons).astype(np.uint8)
    return brightness.take(counts).reshape(image.shape)


def _refine(heights: np.ndarray, wibble: float, rng: np.random.Generator) -> np.ndarray:
    """A step of diamond-square on a torus, (n, n) to (2n, 2n).

    A new height is the mean of its four nearest ones, first those at the corners of a square, then
    those of a diamond, and a uniform variate from -wibble to wibble.
    """
    noise = wibble * (2 * rng.random((3, *heights.shape), np.float32) - 1)
    right, below = np.roll(heights, -1, axis=1), np.roll(heights, -1, axis=0)
    centres = (heights + right + below + np.roll(below, -1, axis=1)) / 4 + noise[0]
    finer = np.empty((2 * len(heights), 2 * len(heights)), np.float32)
    finer[::2, ::2], finer[1::2, 1::2] = heights, centres
    finer[::2, 1::2] = (heights + right + centres + np.roll(centres, 1, axis=0)) / 4 + noise[1]
    finer[1::2, ::2] = (heights + below + centres + np.roll(centres, 1, axis=1)) / 4 + noise[2]
    return finer


def plasma_fractal(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Random heights whose details shrink by decay**2 (as in the authors' code) when twice as fine.

    Args:
        side: A power of two, from 2.
        decay: Wibble decay; the smaller, the rougher.
        rng: All randomness comes from it.

    Returns:
        float32 (side, side), from 0 to 1.
    """
    heights, wibble = np.zeros((1, 1), np.float32), 1.0
    while len(heights) < side:
        heights = _refine(heights, wibble, rng)
        wibble /= decay**2
    heights -= heights.min()
    return heights / heights.max()


def fog(image: np.ndarray, rng: np.random.Generator, severity: int) -> np.ndarray:
    """Add a plasma fractal of grey, and dim all so that the brightest value stays the limit.

    A fractal looks the same at any size, so that a small image gets the same fog as a large one.
    """
    thickest, decay = FOG[severity - 1]
    height, width = image.shape[:2]
    side = max(2, 1 << (max(height, width) - 1).bit_length())
    thickness = 255 * thickest * plasma_fractal(side, decay, rng)[:height, :width]
    brightest = float(image.max())
    foggy = cv2.merge([thickness] * 3)
    foggy += image
    foggy *= brightest / (brightest + 255 * thickest)
    return foggy.astype(np.uint8)


def glass_blur(image: np.ndarray, rng: np.random.Generator, severity: int) -> np.ndarray:
    """Blur, let each pixel take the value of a random one nearby, and blur again.

    As in the authors' code, whose swaps only copy; here all pixels are copied at once.
    """
    deviation, farthest, times = GLASS[severity - 1]
    height, width = image.shape[:2]
    image = cv2.GaussianBlur(image, (0, 0), deviation)
    for _ in range(times):
        down, right = rng.integers(-farthest, farthest + 1, (2, height, width), np.int16)
        rows = (np.arange(height, dtype=np.int32)[:, None] + down).clip(0, height - 1)
        columns = (np.arange(width, dtype=np.int32) + right).clip(0, width - 1)
        image = take_pixels(image, rows, columns)
    return cv2.GaussianBlur(image, (0, 0), deviation)
