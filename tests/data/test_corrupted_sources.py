"""CIFAR-10-C and ImageNet-C in the formats they are distributed in, with few images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robust_submission.data.sources import available_splits, open_source

COUNT = 4  # images per severity


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """fog.npy, whose images are (severity, index, 0) in colour, and labels.npy."""
    pixels = np.zeros((5 * COUNT, 32, 32, 3), dtype=np.uint8)
    pixels[..., 0] = np.repeat(np.arange(1, 6), COUNT)[:, None, None]
    pixels[..., 1] = np.tile(np.arange(COUNT), 5)[:, None, None]
    np.save(tmp_path / "fog.npy", pixels)
    np.save(tmp_path / "gaussian_noise.npy", pixels)
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 8, 8, 0], dtype=np.uint8), 5))
    return tmp_path


def test_cifar10c_has_the_block_of_its_severity(cifar: Path) -> None:
    splits = available_splits("cifar10c", cifar)
    assert splits[:5] == ("fog/1", "fog/2", "fog/3", "fog/4", "fog/5") and len(splits) == 10
    source = open_source("cifar10c", cifar, "fog/4")
    assert source.labels is not None and source.labels.tolist() == [3, 8, 8, 0]
    assert source.class_names is not None and source.class_names[8] == "ship"
    for index in range(COUNT):
        image = source.image(index)
        assert (image.dtype, image.shape) == (np.uint8, (32, 32, 3))
        assert (image == (4, index, 0)).all()
    assert isinstance(source.images.base.base, np.memmap)  # type: ignore[attr-defined]


def replaced(name: str, values: Any) -> Any:
    return lambda root: np.save(root / name, values)


def cut(root: Path) -> None:
    (root / "fog.npy").write_bytes((root / "fog.npy").read_bytes()[:-1])


@pytest.mark.parametrize(
    ("prepare", "split", "message"),
    [
        (lambda root: None, "test", "data.split: .* fog/3, of fog, gaussian_noise in .*'test'"),
        (lambda root: None, "fog/6", "found 'fog/6'"),
        (lambda root: (root / "labels.npy").unlink(), "fog/1", "labels.npy: .* nothing there"),
        (cut, "fog/1", "fog.npy: expected an array of CIFAR-10-C, found: "),
        (replaced("fog.npy", np.array([{}])), "fog/1", "fog.npy: expected an array"),
        (replaced("fog.npy", np.zeros((20, 32, 32, 3))), "fog/1", "uint8 .20, 32.* found float64"),
        (replaced("labels.npy", np.zeros(19, int)), "fog/1", "labels.npy: expected integers, five"),
        (replaced("labels.npy", np.full(20, 10)), "fog/1", "labels 0 to 9, found 10 to 10"),
    ],
)
def test_faults_of_cifar10c_are_named(cifar: Path, prepare: Any, split: str, message: str) -> None:
    prepare(cifar)
    with pytest.raises(ValueError, match=message):
        open_source("cifar10c", cifar, split)


def test_imagenetc_has_the_folder_of_its_severity(tmp_path: Path) -> None:
    for severity in (1, 3):
        for level, name in enumerate(("n02/a.JPEG", "n01/c.JPEG", "n01/b.JPEG")):
            path = tmp_path / "fog" / str(severity) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (20 * severity, 40 * level, 0)).save(path)
    assert available_splits("imagenetc", tmp_path) == ("fog/1", "fog/3")
    source = open_source("imagenetc", tmp_path, "fog/3")
    assert source.ids.tolist() == ["n01/b.JPEG", "n01/c.JPEG", "n02/a.JPEG"]
    assert source.labels is not None and source.labels.tolist() == [0, 0, 1]
    assert source.class_names == ["n01", "n02"]
    assert np.abs(source.image(0)[0, 0].astype(int) - (60, 80, 0)).max() <= 3
    with pytest.raises(ValueError, match=r"of fog in .*found 'fog/2'"):
        open_source("imagenetc", tmp_path, "fog/2")
