"""Datasets of image files: class folders, and flat or nested folders without labels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.images import read_image
from robust_submission.data.sources.listing import list_images, require_folder, subfolders

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class FileSource:
    """Image files under one folder; an image's id is its posix path relative to that folder.

    The paths are one numpy array, which worker processes share instead of copying it as they
    count references.
    """

    folder: Path
    ids: np.ndarray
    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (H, W, 3), RGB; ValueError when it cannot be read."""
        return read_image(self.folder / str(self.ids[index]))


def open_images(root: Path) -> FileSource:
    """Every image in a folder and below, without labels, in natural order (2.png, 10.png)."""
    require_folder(root, "a folder of images")
    return FileSource(root, np.array(list_images(root)))


def folder_splits(root: Path) -> tuple[str, ...]:
    """Those of train, val and test that are folders of class folders in `root`.

    A folder named train that holds no folder is a class of trains.
    """
    require_folder(root, "a folder of class folders")
    found = [split for split in SPLITS if (root / split).is_dir() and subfolders(root / split)]
    return tuple(found)


def order_classes(names: list[str]) -> list[str]:
    """Class names in label order: as numbers when all are integers (0, 1, 10), else as strings."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _classes_of(root: Path, split: str, splits: tuple[str, ...]) -> list[str]:
    """Class names in label order: those of train/ where it exists, else those of `split`."""
    base = root / split if splits else root
    found = subfolders(base)
    if not found:
        raise UserError(f"{base}: expected one folder for each class, found none.")
    classes = subfolders(root / "train") if "train" in splits else found
    if foreign := set(found) - set(classes):
        raise UserError(
            f"{base / min(foreign)}: expected one of the {len(classes)} classes of "
            f"{root / 'train'}, found another."
        )
    return order_classes(classes)


def open_folder(root: Path, split: str) -> FileSource:
    """Class folders: root/<split>/<class>/…, or root/<class>/… where root has no split folders.

    The classes are those of train/, so that a test folder without one of them keeps its labels.

    Raises:
        UserError: no such folder or split, no class folder, a class unknown to train/, or a
            class folder without images.
    """
    splits = folder_splits(root)
    if split not in (splits or ("train", "test")):
        found = f"only {', '.join(splits)}" if splits else "class folders without splits"
        raise UserError(f"{root}: expected the folder {split} of class folders, found {found}.")
    base = root / split if splits else root
    classes = _classes_of(root, split, splits)
    ids, labels = list[str](), list[np.ndarray]()
    for label, name in enumerate(classes):
        if (base / name).is_dir():
            images = list_images(base / name)
            ids += [f"{name}/{image}" for image in images]
            labels.append(np.full(len(images), label, dtype=np.int64))
    return FileSource(base, np.array(ids), np.concatenate(labels), classes)
