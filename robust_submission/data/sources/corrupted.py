"""Corrupted test images as they are distributed: CIFAR-10-C and ImageNet-C.

Hendrycks & Dietterich (2019, arXiv 1903.12261). Here a split is a kind of corruption and a
severity from 1 to 5, such as "fog/3".
"""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.sources.arrays import ArraySource
from robust_submission.data.sources.folders import open_folder, require_folder, subfolders
from robust_submission.data.sources.source import FileSource

_SEVERITIES = ("1", "2", "3", "4", "5")
_CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def cifar10c_splits(root: Path) -> tuple[str, ...]:
    """The splits of CIFAR-10-C: five of every .npy file in `root` but labels.npy."""
    require_folder(root, "the folder of CIFAR-10-C")
    kinds = sorted(path.stem for path in root.glob("*.npy") if path.name != "labels.npy")
    return tuple(f"{kind}/{severity}" for kind in kinds for severity in _SEVERITIES)


def open_cifar10c(root: Path, split: str) -> ArraySource:
    """One kind and severity of CIFAR-10-C: root/<kind>.npy and root/labels.npy, memory-mapped.

    An array of a kind holds the same test images at severity 1, then at 2, and so on to 5.

    Raises:
        UserError: no such split, or a file that is missing, damaged, or of another type or shape.
    """
    kind, severity = _kind_and_severity(root, split, cifar10c_splits(root))
    labels, images = _mapped(root / "labels.npy"), _mapped(root / f"{kind}.npy")
    total = len(labels) if labels.ndim == 1 else 0
    if not total or total % 5 or labels.dtype.kind not in "iu":
        raise _unlike(root / "labels.npy", "integers, five blocks of equal length", labels)
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(_CIFAR10_CLASSES):
        raise UserError(f"{root}/labels.npy: expected labels 0 to 9, found {low} to {high}.")
    if images.dtype != np.uint8 or images.shape != (total, 32, 32, 3):
        raise _unlike(root / f"{kind}.npy", f"uint8 ({total}, 32, 32, 3)", images)
    count = total // 5
    block = slice((severity - 1) * count, severity * count)
    return ArraySource(
        images=images[block],
        labels=labels[block].astype(np.int64),
        class_names=list(_CIFAR10_CLASSES),
        ids=np.array([f"{index:05d}.png" for index in range(count)]),
    )


def _mapped(path: Path) -> np.ndarray:
    """An array file, memory-mapped and read-only; one that would need pickle is refused."""
    expected = f"{path}: expected an array of CIFAR-10-C"
    if not path.is_file():
        raise UserError(f"{expected}, found nothing there.")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{expected}, found: {' '.join(str(error).split())}.") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{expected}, found several arrays (npz).")
    return np.asarray(array)


def _unlike(path: Path, expected: str, found: np.ndarray) -> UserError:
    return UserError(f"{path}: expected {expected}, found {found.dtype} {found.shape}.")


def _kind_and_severity(root: Path, split: str, splits: tuple[str, ...]) -> tuple[str, int]:
    if split in splits:
        kind, severity = split.rsplit("/", 1)
        return kind, int(severity)
    kinds = ", ".join(dict.fromkeys(each.rsplit("/", 1)[0] for each in splits)) or "no kind"
    raise UserError(
        f"data.split: expected KIND/SEVERITY such as fog/3, of {kinds} in {root}, found {split!r}."
    )


def imagenetc_splits(root: Path) -> tuple[str, ...]:
    """The splits of ImageNet-C: root/<kind>/<severity>/."""
    require_folder(root, "the folder of ImageNet-C")
    return tuple(
        f"{kind}/{severity}"
        for kind in subfolders(root)
        for severity in _SEVERITIES
        if (root / kind / severity).is_dir()
    )


def open_imagenetc(root: Path, split: str) -> FileSource:
    """One kind and severity of ImageNet-C: root/<kind>/<severity>/<class>/*.JPEG.

    Labels number the class folders (WordNet ids) in string order, as ImageNet does.

    Raises:
        UserError: no such split, or a folder without classes or images.
    """
    _kind_and_severity(root, split, imagenetc_splits(root))
    return open_folder(root / split, "test")
