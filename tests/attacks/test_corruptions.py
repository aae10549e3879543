"""Corruptions: severity, seeds, and the attack contract."""

import itertools
import random

import cv2
import numpy as np
import pytest
import torch

from robust_submission.attacks import image_seeds
from robust_submission.attacks.corruptions import CORRUPTIONS, FAMILIES, Corruption


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A picture with edges, texture and colour, (48, 64, 3)."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:48, 0:64]
    picture = np.stack([rows * 4, columns * 3, 128 + 90 * np.sin(rows / 3)], axis=2)
    picture[10:30, 20:40] = (220, 40, 60)
    return (picture + rng.normal(0, 12, picture.shape)).clip(0, 255).astype(np.uint8)


def test_covers_four_families_and_imagenet_c_but_for_frost():
    imagenet_c = {
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
        *("motion_blur", "zoom_blur", "snow", "fog", "brightness", "contrast"),
        *("elastic_transform", "pixelate", "jpeg_compression"),
    }
    assert set(FAMILIES) == {"noise", "blur", "weather", "digital"}
    assert imagenet_c <= set(CORRUPTIONS) and len(set(CORRUPTIONS)) == len(CORRUPTIONS) == 19


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_changes_more_with_severity(photo, name):
    changes = []
    for severity in range(1, 6):
        corruption = Corruption(name=name, severity=severity)
        results = [corruption.corrupt(photo, np.random.default_rng(seed)) for seed in range(4)]
        for result in results:
            assert result.dtype == np.uint8 and result.shape == photo.shape
        changes.append(np.mean([np.abs(result - photo.astype(float)) for result in results]))
    assert changes[0] > 0.5 and changes[-1] > 1.2 * changes[0]
    graded = list(changes)
    if name == "saturate":  # ImageNet-C: two severities fade, three glare
        graded = [*changes[1:2], *changes[3:]]
    if name == "spatter":  # water, then mud
        graded = changes[:3]
    assert all(later > 0.95 * earlier for earlier, later in itertools.pairwise(graded))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_depends_on_the_seed_alone(photo, name):
    corruption = Corruption(name=name, severity=3)
    random.seed(1), np.random.seed(1), cv2.setRNGSeed(1)  # noqa: NPY002
    first = corruption.corrupt(photo, np.random.default_rng([0, 5]))
    corruption.corrupt(photo, np.random.default_rng(99))
    random.seed(2), np.random.seed(2), cv2.setRNGSeed(2)  # noqa: NPY002
    again = corruption.corrupt(photo, np.random.default_rng([0, 5]))
    assert first.tobytes() == again.tobytes()


def test_leaves_the_global_generators_alone(photo):
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    for name in CORRUPTIONS:
        Corruption(name=name).corrupt(photo, np.random.default_rng(0))
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


@pytest.mark.parametrize("name", ["gaussian_noise", "fog", "elastic_transform"])
def test_as_an_attack_an_image_does_not_depend_on_its_batch(digits, name):
    attack = Corruption(name=name, severity=4)
    seeds = image_seeds(0, range(20))
    images, labels = digits.images[:20], digits.labels[:20]
    whole = attack(None, images, labels, seeds=seeds)
    rows = torch.tensor([13, 2])
    part = attack(None, images[rows], labels[rows], seeds=seeds[rows])
    assert torch.equal(part, whole[rows])
    assert whole.shape == images.shape and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() <= 1 and whole.is_contiguous()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, same, other = (attack(None, images, labels, generator) for generator in generators)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_keeps_channels_and_axes_in_their_order():
    images = torch.zeros(1, 3, 10, 20)
    images[0, 0], images[0, 2, :, :4] = 200 / 255, 1.0
    found = Corruption(name="jpeg_compression", severity=1)(None, images, torch.zeros(1))
    assert found[0, 0].mean() > 0.6 and found[0, 1].mean() < 0.15
    assert found[0, 2, :, :2].mean() > 0.7 and found[0, 2, :, 10:].mean() < 0.15


def test_refuses_bad_settings():
    with pytest.raises(ValueError, match="name to be one of gaussian_noise"):
        Corruption(name="frost")
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"from 1 to 5. Received: {severity}"):
            Corruption(name="fog", severity=severity)
