"""RandAugment, TrivialAugment and random erasing beside timm's and torchvision's."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_choices
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from robust_submission.data import policies
from robust_submission.data.augment import Augmentation
from robust_submission.data.images import resize_image
from robust_submission.data.policies import (
    DEVIATION,
    MEAN,
    OPERATIONS,
    TRIVIALAUGMENT_LEVELS,
    Draw,
    Levels,
    at_strength,
    erase,
    randaugment,
    randaugment_levels,
    trivialaugment,
)

SIDE = 64
PHOTO = Image.fromarray(resize_image(load_sample_image("china.jpg"), SIDE))
CUBIC = v2.InterpolationMode.BICUBIC
RANDAUGMENT_LEVELS = randaugment_levels(SIDE)
TIMMS = sorted(rand_augment_choices(""), key=lambda name: name.removesuffix("Increasing"))
TIMM = dict(zip(sorted(RANDAUGMENT_LEVELS), TIMMS, strict=True))
WIDE = v2.TrivialAugmentWide(interpolation=CUBIC, fill=MEAN)
TORCHVISION = dict(
    zip(sorted(TRIVIALAUGMENT_LEVELS), sorted(WIDE._AUGMENTATION_SPACE), strict=True)
)


def results(levels: Levels, name: str, strength: float) -> set[bytes]:
    """In both directions, where it has two."""
    image, apply = np.array(PHOTO), at_strength(levels, name, strength)
    return {apply(image, np.random.default_rng(seed)).tobytes() for seed in range(12)}


@pytest.mark.parametrize("name", RANDAUGMENT_LEVELS)
def test_randaugments_operations_are_timms(name: str) -> None:
    random.seed(0)
    level, function = LEVEL_TO_ARG[TIMM[name]], NAME_TO_OP[TIMM[name]]
    settings = {"fillcolor": MEAN, "resample": Image.Resampling.BICUBIC}
    for strength in (0, 0.5, 0.9, 0.97):
        draws = (level(10 * strength, {}) if level else () for _ in range(12))
        expected = {function(PHOTO, *values, **settings).tobytes() for values in draws}
        assert results(RANDAUGMENT_LEVELS, name, strength) == expected, strength


@pytest.mark.parametrize("name", TRIVIALAUGMENT_LEVELS)
def test_trivialaugments_operations_are_torchvisions(name: str) -> None:
    """But for shifts by parts of a pixel, which torchvision cuts to whole ones."""
    theirs = TORCHVISION[name]
    values, signed = WIDE._AUGMENTATION_SPACE[theirs]
    for place in (0, 30) if name.startswith("translate") else (0, 3, 12, 30):
        value = 0.0 if (all_values := values(31, SIDE, SIDE)) is None else float(all_values[place])
        found = results(TRIVIALAUGMENT_LEVELS, name, place / 30)
        for each in {value, -value} if signed else {value}:
            expected = WIDE._apply_image_or_video_transform(
                PHOTO, theirs, each, interpolation=CUBIC, fill={Image.Image: list(MEAN)}
            )
            pixels = [np.frombuffer(one, np.uint8).astype(int) for one in found]
            distances = [np.abs(one - np.asarray(expected).ravel()).mean() for one in pixels]
            assert min(distances) < 0.02, place


def drawn(
    policy: Draw, levels: Levels, count: int, patch: pytest.MonkeyPatch
) -> tuple[Counter[str], dict[str, np.ndarray]]:
    """How often each operation is applied to `count` images, and its strengths with their signs."""
    values: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    recorders = {
        name: lambda image, value, seen=seen: seen.append(value) or image
        for name, seen in values.items()
    }
    patch.setattr(policies, "OPERATIONS", recorders)
    for index in range(count):
        policy(np.zeros((1, 1, 3), np.uint8), np.random.default_rng([0, 0, index]))
    strengths = {
        name: (np.array(seen) - levels[name][0]) / levels[name][1]
        for name, seen in values.items()
        if name in levels and levels[name][1]
    }
    return Counter({name: len(seen) for name, seen in values.items() if seen}), strengths


def test_randaugment_draws_as_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, strengths = drawn(randaugment(SIDE), RANDAUGMENT_LEVELS, 6000, monkeypatch)
    assert counts.keys() == RANDAUGMENT_LEVELS.keys()
    assert all(330 < count < 470 for count in counts.values())  # 2 x 0.5 / 15 of 6000
    sizes = np.abs(np.concatenate(list(strengths.values())))
    assert abs(sizes.mean() - 0.9) < 0.005 and abs(sizes.std() - 0.05) < 0.005 and sizes.max() == 1
    backwards = {name: (each < 0).mean() for name, each in strengths.items()}
    assert {name for name, share in backwards.items() if 0.4 < share < 0.6} == policies.SIGNED
    assert {backwards[name] for name in strengths.keys() - policies.SIGNED} == {0}


def test_trivialaugment_draws_one_operation_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, strengths = drawn(trivialaugment(SIDE), TRIVIALAUGMENT_LEVELS, 5600, monkeypatch)
    assert counts.keys() == TRIVIALAUGMENT_LEVELS.keys() and counts.total() == 5600
    assert all(330 < count < 470 for count in counts.values())
    places, numbers = np.unique(
        np.abs(np.concatenate(list(strengths.values())) * 30).round(9), return_counts=True
    )
    assert places.tolist() == list(range(31)) and numbers.min() > numbers.max() / 2


def test_a_box_of_noise_is_erased_as_by_timm() -> None:
    """Its sides and place, and the noise: of one mean and deviation with theirs."""
    random.seed(0)
    torch.manual_seed(0)
    black, theirs = np.zeros((48, 32, 3), np.uint8), RandomErasing(1, mode="pixel", device="cpu")
    boxes, means = ([], []), ([], [])
    for index in range(1500):
        normal = theirs(torch.full((3, 48, 32), 7.0)).permute(1, 2, 0).numpy()
        expected = (normal * DEVIATION + MEAN).clip(0, 255)
        ours = erase(black, np.random.default_rng([0, 0, index]))
        for place, (image, box) in enumerate(
            ((ours, ours.any(2)), (expected, normal[..., 0] != 7))
        ):
            rows, columns = np.nonzero(box)
            boxes[place].append((np.ptp(rows), np.ptp(columns), rows.min(), columns.min()))
            means[place].append((image[box].mean(), image[box].std()))
    for found, true in zip(*(np.transpose(each) for each in boxes), strict=True):
        assert abs(found.mean() - true.mean()) < 0.8 and abs(found.std() - true.std()) < 0.8
    np.testing.assert_allclose(*(np.mean(each, 0) for each in means), atol=1)


def test_a_share_of_the_images_is_erased() -> None:
    augment, black = Augmentation(name="none", erasing=0.25), np.zeros((32, 32, 3), np.uint8)
    erased = [augment(black, np.random.default_rng([0, 1, index])).any() for index in range(2000)]
    assert 0.22 < np.mean(erased) < 0.28
