"""Data sets of image files: class folders, and flat or nested folders without labels."""

from pathlib import Path

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.sources.listing import list_images, require_folder, subfolders
from robust_submission.data.sources.source import SPLITS, FileSource, order_classes


def open_images(root: Path) -> FileSource:
    """Every image in a folder and below, without labels, in natural order (2.png, 10.png)."""
    require_folder(root, "a folder of images")
    return FileSource(folder=root, ids=np.array(list_images(root)))


def folder_splits(root: Path) -> tuple[str, ...]:
    """Which of train, val and test are folders of class folders in `root`.

    A folder named train without folders in it is a class: trains.
    """
    require_folder(root, "a folder of class folders")
    found = [split for split in SPLITS if (root / split).is_dir() and subfolders(root / split)]
    return tuple(found)


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
    return FileSource(
        folder=base, ids=np.array(ids), labels=np.concatenate(labels), class_names=classes
    )
