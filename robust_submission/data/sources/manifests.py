"""Data sets that a text file lists: the challenge's label.txt, and CSV manifests."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.sources.folders import require_folder
from robust_submission.data.sources.source import LABEL, SPLITS, FileSource, number_labels

_NUMERIC = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


class Row(NamedTuple):
    """One line of a list: where it stands, the image's path, its label as written, its split."""

    line: int
    image: str
    label: str
    split: str


def read_text(path: Path, what: str) -> str:
    """A text file in UTF-8, with or without a byte order mark; UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: expected {what}, found nothing there.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected {what} in UTF-8, found other bytes.") from None
    except OSError as error:
        raise UserError(f"{path}: expected {what}, found: {error.strerror or error}.") from error


def _check_once(path: Path, folder: Path, rows: list[Row]) -> None:
    """Each image is listed once, however its path is written and in whichever split."""
    lines = dict[str, int]()
    for row in rows:
        first = lines.setdefault(os.path.normpath(folder / row.image), row.line)
        if first != row.line:
            raise UserError(
                f"{path}: line {row.line}: expected each image once, "
                f"found {row.image!r} again (first in line {first})."
            )


def _check_images(path: Path, folder: Path, rows: list[Row]) -> None:
    """Each image is there."""
    for row in rows:
        if not (folder / row.image).is_file():
            raise UserError(
                f"{path}: line {row.line}: expected the image {folder / row.image}, "
                "found nothing there."
            )


def _challenge_rows(path: Path) -> list[Row]:
    text = read_text(path, "the challenge's label.txt")
    rows = list[Row]()
    for number, line in enumerate(text.rstrip().splitlines(), start=1):
        words = line.split()
        if len(words) != 2 or not LABEL.fullmatch(words[1]):
            raise UserError(
                f"{path}: line {number}: expected a name and an integer label "
                f"(0.JPEG 5), found {line[:80]!r}."
            )
        rows.append(Row(number, words[0], words[1], ""))
    if not rows:
        raise UserError(f"{path}: expected a line for each image (0.JPEG 5), found none.")
    return rows


def open_challenge(root: Path, split: str) -> FileSource:
    """The challenge's layout: root/images/0.JPEG … and root/label.txt with `0.JPEG 5` a line.

    It is not divided: train and test both mean all of it. Labels are taken as written.

    Raises:
        UserError: a folder or file missing, a malformed or double line (its number), an image
            that is not there.
    """
    if split == "val":
        raise UserError(f"{root}: expected the split train or test, found 'val'.")
    folder = require_folder(root / "images", "the challenge's folder of images")
    rows = _challenge_rows(root / "label.txt")
    _check_once(root / "label.txt", folder, rows)
    _check_images(root / "label.txt", folder, rows)
    labels = np.array([int(row.label) for row in rows], dtype=np.int64)
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    ids = np.array([row.image for row in rows])
    return FileSource(folder=folder, ids=ids, labels=labels, class_names=classes)


def _csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a manifest, checked one by one."""
    text = read_text(path, "a CSV manifest")
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    columns = reader.fieldnames or []
    if not {"image", "label"} <= set(columns):
        found = ", ".join(columns) or "nothing"
        raise UserError(f"{path}: expected the columns image,label[,split], found {found}.")
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}: line {reader.reader.line_num}: expected CSV, found {error}."
            ) from None
        if fields is None:
            return
        image, *others = (fields.get(name) or "" for name in ("image", "label", "split"))
        label, split = (each.strip() for each in others)
        if None in fields or not image or not label:
            raise UserError(
                f"{path}: line {reader.line_num}: expected {len(columns)} filled cells, "
                f"found {[*fields.values()]}."
            )
        if "split" in columns and split not in SPLITS:
            raise UserError(
                f"{path}: line {reader.line_num}: expected the split {', '.join(SPLITS)}, "
                f"found {split!r}."
            )
        if _NUMERIC.fullmatch(label) and not label.isdigit():
            raise UserError(
                f"{path}: line {reader.line_num}: expected an integer from 0 on or a name as "
                f"label, found {label!r}."
            )
        yield Row(reader.line_num, image, label, split)


def manifest_splits(path: Path) -> tuple[str, ...]:
    """Which of train, val and test are in the manifest's column split; () without that column."""
    named = {row.split for row in _csv_rows(path)}
    return tuple(split for split in SPLITS if split in named)


def open_csv(path: Path, split: str) -> FileSource:
    """A manifest with the columns image,label[,split]; paths are relative to its folder.

    Labels that are all integers are taken as written, others are class names in string order;
    both over all splits. Without a column split, train and test both mean all of it.

    Raises:
        UserError: no such file or split, a missing column, an empty cell, a label that is
            another number, a double image, in whichever split, an image that is not there; with
            the number of the line.
    """
    rows = list(_csv_rows(path))
    if not rows:
        raise UserError(f"{path}: expected a row for each image, found none.")
    _check_once(path, path.parent, rows)
    labels, classes = number_labels(row.label for row in rows)
    if rows[0].split or split == "val":
        named = sorted({row.split for row in rows} - {""})
        rows = [row for row in rows if row.split == split]
        if not rows:
            found = ", ".join(named) or "no column split"
            raise UserError(f"{path}: expected rows of the split {split}, found {found}.")
    _check_images(path, path.parent, rows)
    ids = np.array([row.image for row in rows])
    chosen = np.array([labels[row.label] for row in rows], dtype=np.int64)
    return FileSource(folder=path.parent, ids=ids, labels=chosen, class_names=classes)
