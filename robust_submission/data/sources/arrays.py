"""Data sets in memory: scikit-learn's digits, and torchvision's CIFAR-10, SVHN, Fashion-MNIST."""

import gzip
import pickle
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.sources.source import StoredSource

TORCHVISION_FILES = {
    "cifar10": "data_batch_1 … data_batch_5, test_batch, batches.meta, or cifar-10-python.tar.gz",
    "svhn": "train_32x32.mat, test_32x32.mat",
    "fashion_mnist": "train-images-idx3-ubyte … t10k-labels-idx1-ubyte, each also as .gz",
}
_PLACES = {
    "cifar10": ("cifar-10-batches-py",),
    "svhn": ("", "SVHN", "svhn"),
    "fashion_mnist": ("FashionMNIST/raw", "FashionMNIST", "raw", "fashion-mnist", "data/fashion"),
}
"""Folders in which the files are looked for, besides the root; torchvision's own first."""

# What torchvision's readers raise when files are missing, damaged or cannot be fetched, and what
# unpacking them does.
_READER_ERRORS = (
    RuntimeError,
    OSError,
    ValueError,
    AssertionError,
    EOFError,
    KeyError,
    pickle.UnpicklingError,
    tarfile.TarError,
    zlib.error,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class ArraySource(StoredSource):
    """Images held as one array: uint8 (N, H, W, 3) in RGB, or (N, H, W) in grey."""

    images: np.ndarray

    def content(self, index: int) -> bytes:
        return self.images[index].tobytes()

    def place(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int) -> np.ndarray:
        image = self.images[index]
        return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image


def _array_source(images: np.ndarray, labels: object, class_names: list[str]) -> ArraySource:
    return ArraySource(
        images=images,
        labels=np.asarray(labels, dtype=np.int64),
        class_names=class_names,
        ids=np.array([f"{index:05d}.png" for index in range(len(images))]),
        numbered=True,
    )


def _require_train_or_test(name: str, split: str) -> None:
    if split not in ("train", "test"):
        raise UserError(f"{name}: expected the split train or test, found {split!r}.")


def open_digits(split: str) -> ArraySource:
    """scikit-learn's 1,797 digits (8x8, grey): 360 of them, stratified, are the test images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    _require_train_or_test("digits", split)
    pixels, labels = cast(tuple[np.ndarray, np.ndarray], load_digits(return_X_y=True))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    chosen = np.sort(train if split == "train" else test)
    images = np.rint(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return _array_source(images, labels[chosen], [str(digit) for digit in range(10)])


def _read_torchvision(name: str, root: Path, train: bool, download: bool) -> ArraySource:
    from torchvision import datasets

    if name == "cifar10":
        cifar = datasets.CIFAR10(root, train=train, download=download)
        return _array_source(cifar.data, cifar.targets, list(cifar.classes))
    if name == "svhn":
        svhn = datasets.SVHN(root, split="train" if train else "test", download=download)
        images = np.ascontiguousarray(svhn.data.transpose(0, 2, 3, 1))
        return _array_source(images, svhn.labels, [str(digit) for digit in range(10)])
    fashion = datasets.FashionMNIST(root, train=train, download=download)
    return _array_source(fashion.data.numpy(), fashion.targets.numpy(), list(fashion.classes))


def _files(name: str, split: str) -> list[str]:
    """What must be there for torchvision to read a split."""
    from torchvision import datasets

    if name == "cifar10":
        batches = datasets.CIFAR10.train_list + datasets.CIFAR10.test_list
        return [*(file for file, _ in batches), str(datasets.CIFAR10.meta["filename"])]
    if name == "svhn":
        return [f"{split}_32x32.mat"]
    kinds = ("images-idx3", "labels-idx1")
    return [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in kinds]


def _find(root: Path, places: tuple[str, ...], file: str) -> Path | None:
    """A file in the root or in one of the places there, also packed as .gz."""
    folders = [root, *(root / place for place in places)]
    packed = [folder / each for folder in folders for each in (file, f"{file}.gz")]
    return next(filter(Path.is_file, packed), None)


@contextmanager
def _arranged(name: str, root: Path, split: str) -> Iterator[Path]:
    """A folder as torchvision expects it: the root or, for the moment, what is found in it."""
    places, files = _PLACES[name], _files(name, split)
    if all((root / places[0] / file).is_file() for file in files):
        yield root
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, places[0])
        folder.mkdir(parents=True, exist_ok=True)
        found = {file: _find(root, places, file) for file in files}
        archive = root / "cifar-10-python.tar.gz"
        if name == "cifar10" and None in found.values() and archive.is_file():
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
        for file, path in found.items():
            if path and path.suffix == ".gz":
                (folder / file).write_bytes(gzip.decompress(path.read_bytes()))
            elif path and not (folder / file).exists():
                (folder / file).symlink_to(path.resolve())
        yield Path(temporary) if all((folder / file).is_file() for file in files) else root


def open_torchvision(name: str, root: Path, split: str, *, download: bool) -> ArraySource:
    """CIFAR-10, SVHN or Fashion-MNIST in its original files in `root`, packed or not.

    With several processes, let one download first.

    Raises:
        UserError: files missing or damaged, or the download failed.
    """
    _require_train_or_test(name, split)
    try:
        with _arranged(name, root, split) as folder:
            return _read_torchvision(name, folder, split == "train", download)
    except _READER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "" if download else "\nFetch them with --data.download true."
        found = f"found them missing or damaged ({reason}).{advice}"
        raise UserError(f"{root}: expected {name} as {TORCHVISION_FILES[name]}; {found}") from error
