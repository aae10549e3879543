"""Data sets of image files: class folders, and flat or nested folders without labels."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.images import is_image
from robust_submission.data.sources.names import (
    SPLIT_OF,
    is_litter,
    name_splits,
    order_classes,
    say_left_out,
)
from robust_submission.data.sources.source import FileSource

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


def _is_left(name: str) -> bool:
    """Whether a name in a folder is passed over without a word."""
    return name[0] == "." or is_litter(name)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, in natural order; hidden ones and litter are left out.

    Raises:
        UserError: the folder cannot be read.
    """
    with _readable(folder), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not _is_left(entry.name)]
    return _natural_order(names)


def _walk(folder: str, prefix: str, ancestors: frozenset[str]) -> Iterator[str]:
    """Paths of all files below `folder`, without hidden names, litter, and links to a parent."""
    real = os.path.realpath(folder)
    if real in ancestors:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_left(entry.name):
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


def list_images(folder: Path) -> tuple[list[str], list[str]]:
    """Posix paths, relative to `folder`, of the images in it and below, and of its other files.

    Both in natural order; see `is_image`.

    Raises:
        UserError: there is no image, a name is not UTF-8, or a folder cannot be read.
    """
    images, others = list[str](), list[str]()
    with _readable(folder):
        for name in _walk(str(folder), "", frozenset()):
            (images if is_image(f"{folder}/{name}") else others).append(name)
    if not images:
        found = f"none among {len(others)} files" if others else "an empty folder"
        raise UserError(f"{folder}: expected images (.jpg, .png, .bmp, .webp …), found {found}.")
    _require_utf8(folder, images)
    return _natural_order(images), _natural_order(others)


def _require_utf8(folder: Path, names: Iterable[str]) -> None:
    if strange := next(filter(_NOT_UTF8.search, names), None):
        found = strange.encode(errors="surrogateescape")
        raise UserError(f"{folder}: expected file names in UTF-8, found {found!r}.")


def open_images(root: Path) -> FileSource:
    """Every image in a folder and below, without labels, in natural order (2.png, 10.png)."""
    require_folder(root, "a folder of images")
    images, others = list_images(root)
    say_left_out(root, others, "files that are no images")
    return FileSource(folder=root, ids=np.array(images))


def _split_folders(root: Path) -> dict[str, str]:
    """Which of train, val and test are folders of class folders in `root`, and their names.

    A folder named train without folders in it is a class: trains.
    """
    require_folder(root, "a folder of class folders")
    named = [name for name in subfolders(root) if name.lower() in SPLIT_OF]
    return name_splits(root, filter(lambda name: subfolders(root / name), named))


def folder_splits(root: Path) -> tuple[str, ...]:
    """Which of train, val and test are folders of class folders in `root`."""
    return tuple(_split_folders(root))


def _classes_of(root: Path, split: str, splits: dict[str, str]) -> list[str]:
    """Class names in label order: those of train/ where it exists, else those of `split`."""
    base = root / splits.get(split, "")
    found = subfolders(base)
    if not found:
        raise UserError(f"{base}: expected one folder for each class, found none.")
    if len(found) > 1 and not splits and all(name.lower() in SPLIT_OF for name in found):
        expected = f"expected class folders in {' and '.join(found)}, or a manifest (data.name csv)"
        raise UserError(f"{root}: {expected}, found images directly in them.")
    train = root / splits.get("train", splits.get(split, ""))
    classes = subfolders(train)
    if foreign := set(found) - set(classes):
        raise UserError(
            f"{base / min(foreign)}: expected one of the {len(classes)} classes of {train}, "
            "found another."
        )
    return order_classes(classes)


def _loose_images(folder: Path) -> list[str]:
    """Names of the images beside the class folders, in natural order."""
    with _readable(folder), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file() and not _is_left(entry.name)]
    return _natural_order([name for name in names if is_image(f"{folder}/{name}")])


def _require_class(folder: Path, images: list[str], alone: bool) -> None:
    """Raise UserError where a class folder is a data set itself, and data.root a level too high.

    Args:
        folder: The class folder.
        images: Of the class, their paths in it.
        alone: Whether it is the only class.
    """
    folders = {os.path.dirname(image) if "/" in image else "" for image in images}  # noqa: PTH120
    split = any(SPLIT_OF.get(each.split("/")[0].lower()) and "/" in each for each in folders)
    if split or (alone and "" not in folders):
        within = os.path.commonpath([os.path.dirname(each) for each in folders])  # noqa: PTH120
        expected = f"{folder.parent}: expected one folder of images for each class"
        raise UserError(
            f"{expected}, found data in {folder.name}: see data.root {folder / within}."
        )


def open_folder(root: Path, split: str) -> FileSource:
    """Class folders: root/<split>/<class>/…, or root/<class>/… where root has no split folders.

    The classes are those of train/, so that a test folder without one of them keeps its labels.

    Raises:
        UserError: no such folder or split, no class folder, a class unknown to train/, a class
            folder without images, or one that holds class folders.
    """
    splits = _split_folders(root)
    if split not in (splits or ("train", "test")):
        found = f"only {', '.join(splits)}" if splits else "class folders without splits"
        raise UserError(f"{root}: expected the folder {split} of class folders, found {found}.")
    if splits:
        others = [name for name in subfolders(root) if name not in splits.values()]
        say_left_out(root, others, "folders that are no split of class folders")
    base = root / splits.get(split, "")
    classes = _classes_of(root, split, splits)
    _require_utf8(root, classes)
    ids, labels, left_out = list[str](), list[np.ndarray](), list[str]()
    for label, name in enumerate(classes):
        if (base / name).is_dir():
            images, others = list_images(base / name)
            _require_class(base / name, images, alone=len(classes) == 1)
            ids += [f"{name}/{image}" for image in images]
            left_out += [f"{name}/{other}" for other in others]
            labels.append(np.full(len(images), label, dtype=np.int64))
    say_left_out(base, _loose_images(base), "images in no class folder")
    say_left_out(base, left_out, "files that are no images")
    return FileSource(
        folder=base, ids=np.array(ids), labels=np.concatenate(labels), class_names=classes
    )
