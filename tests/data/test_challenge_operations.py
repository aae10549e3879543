"""Each of the 32 operations is a pure function of (image, rng) and does what its name says."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from robust_submission.data.augment import A, Augmentation, apply_transform
from robust_submission.data.challenge_operations import (
    block_shuffle,
    challenge_operations,
    extend,
    random_padding,
)
from robust_submission.data.images import resize_image

NAMES = (
    *("pepper_salt_noise", "color_point_noise", "gaussian_noise", "shot_noise", "impulse_noise"),
    *("speckle_noise", "mosaic", "rgb_shuffle", "rotation", "horizontal_flip", "vertical_flip"),
    *("gaussian_blur", "box_blur", "glass_blur", "defocus_blur", "motion_blur", "zoom_blur"),
    *("rain", "fog", "frost", "snow", "spatter", "extend", "block_shuffle", "local_shuffle"),
    *("random_padding", "contrast", "brightness", "saturation", "jpeg_compression"),
    *("pixelation", "elastic"),
)
CERTAIN = {"horizontal_flip", "vertical_flip"}
MAY_DO_NOTHING = {"rgb_shuffle", "local_shuffle"}  # a permutation may be the identity
SEEDS = range(6)
PHOTO = load_sample_image("china.jpg")
IMAGES = {size: resize_image(PHOTO, size) for size in (32, 224)}
OPERATIONS = {size: challenge_operations(size, p=1) for size in IMAGES}


def results(name: str, size: int) -> list[np.ndarray]:
    return [
        apply_transform(OPERATIONS[size][name], IMAGES[size], np.random.default_rng(seed))
        for seed in SEEDS
    ]


def test_there_are_these_32() -> None:
    assert len(NAMES) == 32
    assert set(challenge_operations(224)) == set(NAMES)


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_pure_function_that_changes_the_image(name: str, size: int) -> None:
    image, before = IMAGES[size], IMAGES[size].copy()
    first = results(name, size)
    assert np.array_equal(image, before)
    assert {(each.shape, each.dtype) for each in first} == {((size, size, 3), np.dtype(np.uint8))}
    changed = [not np.array_equal(each, image) for each in first]
    assert any(changed) if name in MAY_DO_NOTHING else all(changed)
    np.random.seed(5)  # noqa: NPY002  # global state is not asked
    cv2.setRNGSeed(5)
    assert all(map(np.array_equal, first, results(name, size)))
    fresh = challenge_operations(size, p=1)[name]
    assert np.array_equal(first[3], apply_transform(fresh, image, np.random.default_rng(3)))
    assert len({each.tobytes() for each in first}) >= (1 if name in CERTAIN else 2)


IN_PIXELS = [
    *(name for name in NAMES if name.endswith("_blur")),
    *("rain", "frost", "snow", "spatter", "extend", "elastic"),
]


@pytest.mark.parametrize("name", IN_PIXELS)
def test_a_small_image_gets_more_than_a_resampling(name: str) -> None:
    image = IMAGES[32]
    enlarged = cv2.resize(image, (85, 85), interpolation=cv2.INTER_CUBIC)
    resampled = cv2.resize(enlarged, (32, 32), interpolation=cv2.INTER_AREA)

    def distance(other: np.ndarray) -> float:
        return float(np.abs(other.astype(float) - image).mean())

    assert min(map(distance, results(name, 32))) > 1.1 * distance(resampled) > 0


def roughness(image: np.ndarray) -> float:
    return float(np.abs(np.diff(image.astype(float), axis=0)).mean())


def changed_pixels(image: np.ndarray, result: np.ndarray) -> np.ndarray:
    return (image != result).any(axis=2)


def black_or_white(image: np.ndarray, result: np.ndarray) -> bool:
    points = result[changed_pixels(image, result)]
    return bool(np.isin(points.sum(axis=1), (0, 3 * 255)).all())


def few_points(image: np.ndarray, result: np.ndarray) -> bool:
    return 0.003 < changed_pixels(image, result).mean() < 0.03


def one_patch(image: np.ndarray, result: np.ndarray) -> bool:
    rows, columns = np.nonzero(changed_pixels(image, result))
    return 8 <= np.ptp(rows) < 26 and 8 <= np.ptp(columns) < 26


def rougher(image: np.ndarray, result: np.ndarray) -> bool:
    return roughness(result) > 1.01 * roughness(image)


def smoother(image: np.ndarray, result: np.ndarray) -> bool:
    return roughness(result) < 0.9 * roughness(image)


def brighter(image: np.ndarray, result: np.ndarray) -> bool:
    return result.mean() > image.mean() + 5


def same_pixels(image: np.ndarray, result: np.ndarray) -> bool:
    return np.array_equal(*(np.sort(each.reshape(-1, 3), axis=0) for each in (image, result)))


def blocks_of_8(image: np.ndarray, result: np.ndarray) -> bool:
    steps = np.abs(np.diff(result.astype(float), axis=0)).mean(axis=(1, 2))
    return steps[7::8].mean() > 1.25 * np.delete(steps, np.s_[7::8]).mean()


def black_corner(image: np.ndarray, result: np.ndarray) -> bool:
    return any((result[row, column] == 0).all() for row in (0, -1) for column in (0, -1))


def saturation(image: np.ndarray) -> float:
    return float(np.ptp(image, axis=2).mean())


EFFECTS: dict[str, Callable[[np.ndarray, np.ndarray], bool]] = {
    **dict.fromkeys(["pepper_salt_noise", "impulse_noise"], black_or_white),
    "color_point_noise": few_points,
    **dict.fromkeys(["gaussian_noise", "shot_noise", "speckle_noise", "extend"], rougher),
    "mosaic": one_patch,
    "rgb_shuffle": lambda image, result: np.array_equal(np.sort(image, 2), np.sort(result, 2)),
    "rotation": black_corner,
    "horizontal_flip": lambda image, result: np.array_equal(image[:, ::-1], result),
    "vertical_flip": lambda image, result: np.array_equal(image[::-1], result),
    **dict.fromkeys(["block_shuffle", "local_shuffle"], same_pixels),
    **dict.fromkeys([name for name in NAMES if name.endswith("_blur")], smoother),
    **dict.fromkeys(["fog", "contrast"], smoother),
    **dict.fromkeys(["snow", "brightness"], brighter),
    "saturation": lambda image, result: abs(saturation(result) - saturation(image)) > 10,
    "jpeg_compression": blocks_of_8,
    "pixelation": lambda image, result: (np.diff(result, axis=0) == 0).mean() > 0.3,
}


@pytest.mark.parametrize("name", EFFECTS)
def test_does_what_its_name_says(name: str) -> None:
    assert all(EFFECTS[name](IMAGES[224], result) for result in results(name, 224))


PLACES = np.indices((224, 224), np.uint8).transpose(1, 2, 0)  # each pixel its row and column


@pytest.mark.parametrize("seed", SEEDS)
def test_functions_against_the_places_that_pixels_came_from(seed: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = extend(PLACES, rng).astype(int) - PLACES
    assert offsets.min() == 0 and 2 <= offsets.max() <= 8
    assert (offsets[-1, :, 0] == 0).all() and (offsets[:, -1, 1] == 0).all()
    rolled = block_shuffle(PLACES, rng)[0, 0].tolist()
    assert sorted(rolled)[0] == 0 and 0.4 * 224 - 1 <= sorted(rolled)[1] <= 0.6 * 224 + 1


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_keeps_a_small_copy(seed: int) -> None:
    image = np.zeros((224, 224, 3), np.uint8)
    image[..., 0] = 255  # red, which no grey is
    padded = random_padding(image, np.random.default_rng(seed))
    rows, columns = np.nonzero((padded == (255, 0, 0)).all(axis=2))
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert 0.65 - 1 / 224 <= len(rows) ** 0.5 / 224 <= 0.95


def test_each_is_applied_to_one_image_in_twenty() -> None:
    for name, operation in challenge_operations(32).items():
        count = sum(
            not np.array_equal(
                apply_transform(operation, IMAGES[32], np.random.default_rng(seed)), IMAGES[32]
            )
            for seed in range(400)
        )
        assert 7 <= count <= 36, name  # 20 expected, deviation 4.4


@pytest.mark.parametrize("flip", [True, False])
def test_the_recipe_is_a_crop_and_the_operations(flip: bool) -> None:
    crop, *operations = Augmentation(name="challenge", image_size=64, flip=flip)._chain
    assert isinstance(crop, A.RandomResizedCrop) and crop.size == (64, 64)
    assert [operation.p for operation in operations] == [0.05] * (32 if flip else 30)
    flips = (A.HorizontalFlip, A.VerticalFlip)
    assert sum(isinstance(operation, flips) for operation in operations) == (2 if flip else 0)
