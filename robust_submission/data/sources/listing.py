"""Which images a folder holds, and in which order."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robust_submission.cli.errors import UserError
from robust_submission.data.images import SUFFIXES

_NUMBER = re.compile(r"([0-9]+)")


def natural_key(path: str) -> list[list[str | int]]:
    """Sort key of a posix path by which 2.png comes before 10.png, in every folder of the path."""
    return [
        [int(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(folder))]
        for folder in path.split("/")
    ]


def natural_order(names: list[str]) -> list[str]:
    """Names in natural order; those that differ only in leading zeros in string order."""
    return sorted(sorted(names), key=natural_key)


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
    return natural_order(names)


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
    for name in images:
        if not name.isascii():
            _require_utf8(folder, name)
    return natural_order(images)


def _require_utf8(folder: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        found = name.encode(errors="surrogateescape")
        raise UserError(f"{folder}: expected file names in UTF-8, found {found!r}.") from None
