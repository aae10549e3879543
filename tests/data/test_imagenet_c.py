"""ImageNet-C's definitions, against closed forms, and against the plainest loops that do them."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from robust_submission.data.corruptions.imagenet_c import (
    FOG,
    GLASS,
    PHOTONS,
    fog,
    glass_blur,
    plasma_fractal,
    shot_noise,
    take_pixels,
)

SEVERITIES = range(1, 6)
NOISE = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("level", [0, 1, 100, 255])
def test_shot_noise_is_poisson(severity: int, level: int) -> None:
    photons, size = PHOTONS[severity - 1], (200, 300, 3)
    noisy = shot_noise(np.full(size, level, np.uint8), np.random.default_rng(level), severity)
    values = (np.arange(photons + 1) / photons * 255).astype(np.uint8)
    found = np.array([(noisy == value).sum() for value in values])
    assert found.sum() == noisy.size
    counts, mean = np.arange(photons), level / 255 * photons
    chances = [*stats.poisson.pmf(counts, mean), stats.poisson.sf(photons - 1, mean)]
    expected = noisy.size * np.array(chances)
    rare = expected < 10  # together, as the statistic is one of large numbers
    assert found[rare].sum() < expected[rare].sum() + 6 * (1 + expected[rare].sum()) ** 0.5
    excess = ((found - expected)[~rare] ** 2 / expected[~rare]).sum()
    assert excess < stats.chi2.ppf(1 - 1e-6, max(1, (~rare).sum()))


def slow_fractal(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Diamond-square as in textbooks: one height at a time, with the same variates."""
    heights, step, wibble = np.zeros((side, side)), side, 1.0
    while step > 1:
        half, places = step // 2, range(0, side, step)
        noise = wibble * (2 * rng.random((3, side // step, side // step), np.float32) - 1)

        def mean(row: int, column: int, *steps: tuple[int, int]) -> float:
            return sum(heights[(row + d) % side, (column + r) % side] for d, r in steps) / 4

        corners = [(d * half, r * half) for d in (-1, 1) for r in (-1, 1)]
        beside = [(half, 0), (-half, 0), (0, half), (0, -half)]
        for kind, (down, right) in enumerate([(half, half), (0, half), (half, 0)]):
            for row in places:
                for column in places:
                    near = beside if kind else corners
                    heights[row + down, column + right] = (
                        mean(row + down, column + right, *near)
                        + noise[kind, row // step, column // step]
                    )
        step, wibble = half, wibble / decay**2
    return (heights - heights.min()) / np.ptp(heights)


@pytest.mark.parametrize("side", [2, 4, 32])
def test_fractal_is_diamond_square(side: int) -> None:
    heights = plasma_fractal(side, 1.7, np.random.default_rng(3))
    assert (heights.min(), heights.max()) == (0, 1)
    np.testing.assert_allclose(
        heights, slow_fractal(side, 1.7, np.random.default_rng(3)), atol=1e-5
    )


def test_fog_is_image_and_fractal_in_the_brightest_values_range() -> None:
    for severity, (thickest, decay) in enumerate(FOG, 1):
        dim = NOISE // 2
        heights = plasma_fractal(64, decay, np.random.default_rng(7))[:30, :50, None]
        foggy = fog(dim, np.random.default_rng(7), severity)
        peak = dim.max() / 255
        expected = (dim / 255 + thickest * heights) * peak / (peak + thickest) * 255
        assert np.abs(foggy + 0.5 - expected).max() < 0.51 and foggy.max() <= dim.max()
        assert foggy.std() < dim.std()
    grey = [fog(NOISE // 2 + 64, np.random.default_rng(seed), 3).mean() for seed in range(8)]
    assert np.mean(grey) > 64 + 64 / 2 - 32  # a veil, not darkness


def test_pixels_of_glass_blur_come_from_nearby() -> None:
    places = np.zeros((40, 40, 3), np.uint8)
    places[20, 20] = 255
    for severity, (deviation, farthest, times) in enumerate(GLASS, 1):
        results = [glass_blur(places, np.random.default_rng(seed), severity) for seed in range(40)]
        reach = farthest * times + 2 * int(4 * deviation + 1)
        rows, columns = np.nonzero(np.max(results, axis=(0, 3)))
        assert max(np.abs(rows - 20).max(), np.abs(columns - 20).max()) <= reach
        assert len({each.tobytes() for each in results}) > 20


def test_glass_blur_scrambles_more_with_severity_and_keeps_the_mean() -> None:
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2)
    results = [glass_blur(ramp, np.random.default_rng(0), severity) for severity in (2, 3, 5)]
    scrambled = [np.abs(each.astype(int) - ramp).mean() for each in results]
    assert all(later > earlier for earlier, later in pairwise(scrambled))
    assert all(abs(each.mean() - ramp.mean()) < 0.5 for each in results)


@pytest.mark.parametrize("corrupt", [shot_noise, fog, glass_blur])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (65, 3)])
def test_any_size_and_a_function_of_the_rng(
    corrupt: Callable[..., np.ndarray], shape: tuple[int, int]
) -> None:
    image = np.full((*shape, 3), 200, np.uint8)
    for severity in SEVERITIES:
        first, again = (corrupt(image, np.random.default_rng(1), severity) for _ in range(2))
        assert first.shape == image.shape and first.dtype == np.uint8
        assert np.array_equal(first, again) and (image == 200).all()


def test_black_stays_black() -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    assert all(not f(black, np.random.default_rng(0), 5).any() for f in (shot_noise, fog))


def test_taken_pixels_are_those_of_numpys_indexing() -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 30, (7, 9)), rng.integers(0, 50, 9)
    assert np.array_equal(take_pixels(NOISE, rows, columns), NOISE[rows, columns])
