"""Corruptions: five severities, and pixels that depend on the seed alone."""

import itertools
import random
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from robust_submission.data.corruptions import CORRUPTIONS, FAMILIES, Corruption


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A picture with edges, texture and colour, (48, 64, 3)."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:48, 0:64]
    picture = np.stack([rows * 4, columns * 3, 128 + 90 * np.sin(rows / 3)], axis=2)
    picture[10:30, 20:40] = (220, 40, 60)
    return (picture + rng.normal(0, 12, picture.shape)).clip(0, 255).astype(np.uint8)


def test_covers_four_families_and_imagenet_c_but_for_frost() -> None:
    imagenet_c = {
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
        *("motion_blur", "zoom_blur", "snow", "fog", "brightness", "contrast"),
        *("elastic_transform", "pixelate", "jpeg_compression"),
    }
    assert set(FAMILIES) == {"noise", "blur", "weather", "digital"}
    assert imagenet_c <= set(CORRUPTIONS) and len(set(CORRUPTIONS)) == len(CORRUPTIONS) == 19


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_changes_more_with_severity(photo: np.ndarray, name: str) -> None:
    changes = list[float]()
    for severity in range(1, 6):
        corrupt = Corruption(name=name, severity=severity)
        results = [corrupt(photo, np.random.default_rng(seed)) for seed in range(4)]
        assert {(each.dtype, each.shape) for each in results} == {(photo.dtype, photo.shape)}
        changes.append(float(np.mean([np.abs(each - photo.astype(float)) for each in results])))
    assert changes[0] > 0.5 and changes[-1] > 1.2 * changes[0]
    graded = list(changes)
    if name == "saturate":  # ImageNet-C: two severities fade, three glare
        graded = [*changes[1:2], *changes[3:]]
    if name == "spatter":  # water, then mud
        graded = changes[:3]
    assert all(later > 0.95 * earlier for earlier, later in itertools.pairwise(graded))


def global_state() -> tuple[object, bytes, bytes]:
    numpy_state = np.random.get_state()[1].tobytes()  # noqa: NPY002  # type: ignore[index]
    return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_depends_on_the_rng_alone_and_leaves_global_state(photo: np.ndarray, name: str) -> None:
    corrupt = Corruption(name=name)
    first = corrupt(photo, np.random.default_rng([0, 5]))
    random.seed(2), np.random.seed(2), cv2.setRNGSeed(2)  # noqa: NPY002
    before = global_state()
    corrupt(photo, np.random.default_rng(99))
    again = corrupt(photo, np.random.default_rng([0, 5]))
    assert first.tobytes() == again.tobytes() and global_state() == before


@pytest.mark.parametrize("name", ["gaussian_noise", "fog", "elastic_transform"])
def test_in_a_batch_each_image_depends_on_its_own_seed(name: str) -> None:
    corruption = Corruption(name=name, severity=4)
    seeds = torch.arange(10, 26)
    images = torch.rand(16, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    whole = corruption.batch(images, seeds)
    rows = torch.tensor([13, 2])
    assert torch.equal(corruption.batch(images[rows], seeds[rows]), whole[rows])
    assert whole.shape == images.shape and whole.dtype == torch.float32 and whole.is_contiguous()
    pixels = (images[3] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    alone = corruption(pixels, np.random.default_rng(13))
    assert torch.equal(whole[3], torch.from_numpy(alone).permute(2, 0, 1).float() / 255)
    assert not torch.equal(corruption.batch(images, seeds + 1), whole)
    assert corruption.batch(images[:0], seeds[:0]).shape == (0, 3, 10, 12)


def test_every_seed_index_name_and_severity_has_its_own_draw() -> None:
    corruptions = [
        Corruption(name=name, severity=level) for name in CORRUPTIONS for level in (1, 5)
    ]
    seeds = [each.seeds(seed, range(50)).tolist() for each in corruptions for seed in (0, 1)]
    assert len(set(itertools.chain(*seeds))) == 2 * 2 * 19 * 50
    fog = Corruption(name="fog", severity=2)
    assert fog.seeds(7, [3, 9]).tolist() == fog.seeds(7, range(10))[[3, 9]].tolist()


def test_channels_and_axes_keep_their_order() -> None:
    images = torch.zeros(1, 3, 10, 20)
    images[0, 0], images[0, 2, :, :4] = 200 / 255, 1.0
    found = Corruption(name="jpeg_compression", severity=1).batch(images, torch.zeros(1).long())
    assert found[0, 0].mean() > 0.6 and found[0, 1].mean() < 0.15
    assert found[0, 2, :, :2].mean() > 0.7 and found[0, 2, :, 10:].mean() < 0.15


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"corruption: expected one of gaussian_noise.* 'frost'"):
        Corruption(name="frost")
    with pytest.raises(ValueError, match="severity: expected 1 to 5, found 6"):
        Corruption(name="fog", severity=6)


def test_importing_corruptions_or_loaders_does_not_import_albumentations() -> None:
    code = (
        "import sys, robust_submission.data.corruptions, robust_submission.data.loader;"
        "sys.exit('albumentations' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
