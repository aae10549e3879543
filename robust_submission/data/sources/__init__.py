"""Where images come from: one `open_source` for embedded sets, torchvision's, and files.

open_source("digits")                                  embedded, no files needed
open_source("cifar10", Path("data/raw"), download=True)
open_source("folder", Path("data/raw/cifar10"), "test")
open_source("shards", Path("shards"), "test")          tar files in WebDataset's format
open_source("images", Path("test_images"))             no labels
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.sources.arrays import TORCHVISION_FILES, open_digits, open_torchvision
from robust_submission.data.sources.folders import SPLITS, folder_splits, open_folder, open_images
from robust_submission.data.sources.manifests import manifest_splits, open_challenge, open_csv
from robust_submission.data.sources.shards import open_shards, shard_splits
from robust_submission.data.sources.splits import split_train_validation, stratified_subset

__all__ = [
    "SOURCES",
    "Source",
    "available_splits",
    "open_source",
    "split_train_validation",
    "stratified_subset",
]

SOURCES = ("digits", *TORCHVISION_FILES, "folder", "shards", "challenge", "csv", "images")
DOWNLOADS = Path("data/raw")


class Source(Protocol):
    """Images by index, with what is known of them."""

    @property
    def ids(self) -> np.ndarray:
        """(N,) of str: an image's name in a prediction file; unique."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (N,), or None where there are none."""
        ...

    @property
    def class_names(self) -> list[str] | None:
        """Names in label order, or None where there are no labels."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (H, W, 3), RGB; ValueError when it cannot be read."""
        ...


def _require_root(name: str, root: Path | None) -> Path:
    if name in TORCHVISION_FILES:
        return root or DOWNLOADS
    if root is None:
        raise UserError(f"expected --data.root with the source {name}, found none.")
    return root


def _check_source(name: str, root: str | Path | None) -> None:
    if name not in SOURCES:
        raise UserError(f"expected a source among {', '.join(SOURCES)}, found {name!r}.")
    if name == "digits" and root is not None:
        raise UserError(f"expected a --data.name other than digits with --data.root {root}.")


def available_splits(name: str, root: str | Path | None = None) -> tuple[str, ...]:
    """Which of train, val and test a source is divided into; () where it isn't divided."""
    _check_source(name, root)
    if name == "digits" or name in TORCHVISION_FILES:
        return ("train", "test")
    root = _require_root(name, Path(root) if root is not None else None)
    finders = {"folder": folder_splits, "shards": shard_splits, "csv": manifest_splits}
    return finders[name](root) if name in finders else ()


def open_source(
    name: str, root: str | Path | None = None, split: str = "train", *, download: bool = False
) -> Source:
    """Open a dataset.

    Args:
        name: digits, cifar10, svhn, fashion_mnist, folder (class folders), shards (WebDataset tar
            files), challenge (images/ and label.txt), csv (a manifest image,label[,split]) or
            images (no labels).
        root: The folder, or the manifest's path; digits needs none, and torchvision's sets are
            kept in data/raw unless it is given.
        split: train, val or test; a source that isn't divided gives all of itself for train and
            for test. Of no effect with images.
        download: Let torchvision fetch its sets when they are missing.

    Raises:
        UserError: an unknown name or split, a root with digits, or files that are not as expected.
    """
    _check_source(name, root)
    if split not in SPLITS:
        raise UserError(f"expected a split among {', '.join(SPLITS)}, found {split!r}.")
    if name == "digits":
        return open_digits(split)
    root = _require_root(name, Path(root) if root is not None else None)
    if name in TORCHVISION_FILES:
        return open_torchvision(name, root, split, download=download)
    if name == "images":
        return open_images(root)
    openers = {
        "folder": open_folder,
        "shards": open_shards,
        "challenge": open_challenge,
        "csv": open_csv,
    }
    return openers[name](root, split)
