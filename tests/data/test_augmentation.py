"""Augmentation is a pure function of (image, rng), and does to pixels what its name says."""

import pickle
from dataclasses import replace

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from robust_submission.data.augment import (
    AUGMENTATIONS,
    A,
    Augmentation,
    AugMix,
    apply_transform,
    resize_shorter_side,
)
from robust_submission.data.challenge_operations import Drawn
from robust_submission.data.images import resize_image
from robust_submission.data.policies import POLICIES

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
WIDE = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
KINDS: dict[str, Augmentation] = {
    **{name: Augmentation(name=name) for name in AUGMENTATIONS},
    **{name: Augmentation(policy=name) for name in POLICIES},
    "erasing": Augmentation(erasing=0.5),
    "all": Augmentation(name="imagenet", policy="randaugment", erasing=0.5),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("image", [NOISE, WIDE], ids=["square", "wide"])
def test_equal_rng_gives_equal_bytes(name: str, image: np.ndarray) -> None:
    augment, other = replace(KINDS[name]), replace(KINDS[name])
    before = image.copy()
    first = augment(image, np.random.default_rng([1, 2, 3]))
    augment(WIDE, np.random.default_rng(99))  # leaves no trace
    np.random.seed(5)  # noqa: NPY002  # nor does global state
    assert np.array_equal(first, augment(image, np.random.default_rng([1, 2, 3])))
    assert np.array_equal(first, other(image, np.random.default_rng([1, 2, 3])))
    assert np.array_equal(
        first, pickle.loads(pickle.dumps(augment))(image, np.random.default_rng([1, 2, 3]))
    )
    assert (first.shape, first.dtype) == ((32, 32, 3), np.uint8)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"none"}))
def test_another_rng_gives_other_bytes(name: str) -> None:
    results = {KINDS[name](NOISE, np.random.default_rng(seed)).tobytes() for seed in range(40)}
    assert len(results) >= 15


@pytest.mark.parametrize("name", KINDS)
def test_global_random_state_is_left_alone(name: str) -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002  # type: ignore[index]
    for seed in range(20):
        KINDS[name](NOISE, np.random.default_rng(seed))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002  # type: ignore[index]


def shifts_of(flip: bool, padding: float, draws: int = 400) -> set[tuple[int, int, bool]]:
    """Which shifts and flips of NOISE "light" gives, each found among all that are possible."""
    pixels = round(padding * 32)
    padded = np.pad(NOISE, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    possible = dict[bytes, tuple[int, int, bool]]()
    for top in range(2 * pixels + 1):
        for left in range(2 * pixels + 1):
            crop = padded[top : top + 32, left : left + 32]
            possible[crop.tobytes()] = (top, left, False)
            possible[crop[:, ::-1].tobytes()] = (top, left, True)
    augment = Augmentation(name="light", image_size=32, flip=flip, padding=padding)
    return {
        possible[augment(NOISE, np.random.default_rng(seed)).tobytes()] for seed in range(draws)
    }


def test_light_shifts_by_reflected_padding_and_flips() -> None:
    found = shifts_of(flip=True, padding=4 / 32)
    assert len(found) > 100  # of 162
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(9))
    assert {flipped for _, _, flipped in found} == {False, True}


def test_light_without_flip_or_padding() -> None:
    assert {flipped for _, _, flipped in shifts_of(flip=False, padding=2 / 32)} == {False}
    assert shifts_of(flip=True, padding=0) == {(0, 0, False), (0, 0, True)}


@pytest.mark.parametrize("policy", ["none", "randaugment"])
def test_light_is_albumentations_pad_crop_and_flip(policy: str) -> None:
    pad = A.Pad(padding=4, border_mode=cv2.BORDER_REFLECT_101)
    parts = [pad, A.RandomCrop(32, 32), A.HorizontalFlip(p=0.5)]
    if policy != "none":
        parts.append(Drawn(POLICIES[policy](32)))
    augment, same = Augmentation(name="light", policy=policy), A.Compose(parts)
    for seed in range(50):
        expected = apply_transform(same, NOISE, np.random.default_rng(seed))
        assert np.array_equal(augment(NOISE, np.random.default_rng(seed)), expected)


@pytest.mark.parametrize("side", [20, 32, 57, 100])
def test_training_images_are_resized_as_those_to_predict(side: int) -> None:
    photo = load_sample_image("china.jpg")
    square = photo[:, 106 : 106 + 427]
    expected = resize_image(square, side).astype(int)
    for image in (photo, photo.transpose(1, 0, 2)):
        resized = Augmentation(image_size=side)(image, np.random.default_rng(0))
        turned = resized if image is photo else resized.transpose(1, 0, 2)
        assert np.abs(turned - expected).max() <= 1 and (turned != expected).mean() < 0.2
    assert resize_shorter_side(photo, side).shape == (side, round(640 / 427 * side), 3)
    square.flags.writeable = False
    larger = resize_shorter_side(square, 600).astype(int)
    assert np.abs(larger - resize_image(square, 600)).max() <= 2


def test_imagenet_takes_the_whole_image_at_scale_one() -> None:
    smooth = np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None].repeat(64, 1).repeat(3, 2)
    augment = Augmentation(name="imagenet", image_size=32, min_scale=0.08, flip=False)
    spans = [np.ptp(augment(smooth, np.random.default_rng(seed))) for seed in range(30)]
    assert min(spans) < 120  # a part of the gradient
    whole = Augmentation(name="imagenet", image_size=32, min_scale=1.0, flip=False)
    assert min(np.ptp(whole(smooth, np.random.default_rng(seed))) for seed in range(10)) > 180


def test_crops_are_those_of_albumentations() -> None:
    """On a gradient, which no filter changes."""
    rows, columns = np.mgrid[0:90, 0:120]
    image = np.stack([2 * rows, 2 * columns, rows + columns], axis=2).astype(np.uint8)
    crop = A.RandomResizedCrop(size=(32, 32), interpolation=cv2.INTER_LINEAR)
    augment = Augmentation(name="imagenet", flip=False)
    for seed in range(20):
        cropped = augment(image, np.random.default_rng(seed))
        expected = apply_transform(A.Compose([crop]), image, np.random.default_rng(seed))
        assert np.abs(cropped.astype(int) - expected)[2:-2, 2:-2].max() <= 2


def augmixed(image: np.ndarray) -> list[np.ndarray]:
    augment = Augmentation(name="augmix", image_size=32, flip=False, padding=0)
    return [augment(image, np.random.default_rng(seed)) for seed in range(60)]


def test_augmix_mixes_the_image_with_its_changes() -> None:
    """Between 0 and 255 without wrapping, from next to the image to far from it."""
    extreme = np.where(NOISE < 128, 0, 255).astype(np.uint8)
    distances = [np.abs(mixed.astype(int) - extreme).mean() for mixed in augmixed(extreme)]
    assert min(distances) < 10 < 30 < max(distances) < 128
    levels = np.unique(np.concatenate(augmixed(extreme)))
    assert levels.min() == 0 and levels.max() == 255 and len(levels) > 200


def test_augmix_weighs_image_and_chains_as_the_paper() -> None:
    """With an inversion for each operation, black turns to 255 m (sum of the odd chains' w)."""
    mix, black = AugMix(), np.zeros((8, 8, 3), np.uint8)
    mix.operation = A.OneOf([A.InvertImg(p=1)], p=1)
    results = [apply_transform(mix, black, np.random.default_rng(seed)) for seed in range(500)]
    assert all(np.ptp(result) == 0 for result in results)
    levels = np.array([result[0, 0, 0] for result in results]) / 255
    assert abs(levels.mean() - 1 / 2 * 2 / 3) < 0.04  # depths 1 and 3 of 1, 2, 3 invert
    assert np.isclose((levels < 1 / 512).mean(), 1 / 27, atol=0.02)  # all three of depth 2
    assert levels.max() > 0.9
    mix.operation = A.OneOf([A.NoOp(p=1)], p=1)
    assert np.array_equal(NOISE, apply_transform(mix, NOISE, np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "heavy"}, "augmentation: expected one of none, light, .*, found 'heavy'"),
        (
            {"policy": "rand"},
            "policy: expected one of none, randaugment, trivialaugment, found 'ra",
        ),
        ({"erasing": 1.5}, "erasing: expected from 0 to 1, found 1.5"),
        ({"padding": 1.0}, "padding: expected from 0 to below 1, found 1.0"),
        ({"min_scale": 0.0}, "min_scale: expected above 0"),
        ({"image_size": 0}, "image_size: expected at least 1, found 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)  # type: ignore[arg-type]
