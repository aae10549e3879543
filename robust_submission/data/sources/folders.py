"""Data sets of image files: class folders, and flat or nested folders without labels."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.images import SUFFIXES
from robust_submission.data.sources.source import SPLITS, FileSource, order_classes

_NUMBER = re.compile(r"([0-9]+)")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what Python puts for bytes that are not


def _natural_key(path: str) -> list[list[str | int]]:
    """Sort key of a posix path by which 2.png comes before 10.png, in every folder of the path."""
    return [
        [int(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(folder))]
        for folder in path.split("/")
    ]


def _natural_order(names: list[str]) -> list[str]:
    """Names in natural order; those that differ only in leading zeros in string order."""
    return sorted(sorted(names), key=_natural_key)


def require_folder(path: Path, what: str) -> Path:
    """The path itself, when it is a folder.

    Raises:
        UserError: it is a file or is not there; `what` says what was expected.
    """
    if path.is_dir():
        return path
    found = "a file" if path.exists() else "nothing there"
    raise UserError(f"{path}: expected {what}, found {found}.")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        raise UserError(f"{folder}: expected a readable folder, found: {found}.") from error


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, hidden ones left out, in natural order.

    Raises:
        UserError: the folder cannot be read.
    """
    with _readable(folder), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    return _natural_order(names)


def _walk(folder: str, prefix: str, ancestors: frozenset[str]) -> Iterator[str]:
    """Paths of all files below `folder`; hidden names and links back to a parent are left out."""
    real = os.path.realpath(folder)
    if real in ancestors:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", ancestors | {real})
            else:
                yield prefix + entry.name


def list_files(folder: Path) -> list[str]:
    """Posix paths, relative to `folder`, of the files in it and below, but for hidden ones.

    Raises:
        UserError: a folder cannot be read.
    """
    with _readable(folder):
        return list(_walk(str(folder), "", frozenset()))


def list_images(folder: Path) -> list[str]:
    """Posix paths, relative to `folder`, of the image files in it and below, in natural order.

    A file counts as an image by its ending (`SUFFIXES`, either case).

    Raises:
        UserError: there is no image, a name is not UTF-8, or a folder cannot be read.
    """
    names = list_files(folder)
    images = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]  # noqa: PTH122
    if not images:
        found = f"none among {len(names)} files" if names else "an empty folder"
        raise UserError(f"{folder}: expected images (.jpg, .png, .bmp, .webp …), found {found}.")
    if strange := next(filter(_NOT_UTF8.search, images), None):
        found = strange.encode(errors="surrogateescape")
        raise UserError(f"{folder}: expected file names in UTF-8, found {found!r}.")
    return _natural_order(images)


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
