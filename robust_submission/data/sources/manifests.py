"""Data sets that a text file lists: the challenge's label.txt, and CSV manifests."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


def _fault(path: Path, line: int, message: str) -> UserError:
    return UserError(f"{path}: line {line}: expected {message}.")


def _open_rows(path: Path, folder: Path, rows: list[Row], split: str) -> FileSource:
    """The images of a split; each is listed once, however its path is written, and is there."""
    lines = dict[str, int]()
    for row in rows:
        first = lines.setdefault(os.path.normpath(folder / row.image), row.line)
        if first != row.line:
            again = f"found {row.image!r} again (first in line {first})"
            raise _fault(path, row.line, f"each image once, {again}")
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        found = ", ".join(sorted({row.split for row in rows} - {""})) or "no column split"
        raise UserError(f"{path}: expected rows of the split {split}, found {found}.")
    for row in chosen:
        if not (folder / row.image).is_file():
            raise _fault(path, row.line, f"the image {folder / row.image}, found nothing there")
    numbers, classes = number_labels(row.label for row in rows)
    return FileSource(
        folder=folder,
        ids=np.array([row.image for row in chosen]),
        labels=np.array([numbers[row.label] for row in chosen], dtype=np.int64),
        class_names=classes,
    )


def _challenge_rows(path: Path) -> list[Row]:
    rows = list[Row]()
    lines = read_text(path, "the challenge's label.txt").rstrip().splitlines()
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) != 2 or not LABEL.fullmatch(words[1]):
            pair = "a name and an integer label (0.JPEG 5)"
            raise _fault(path, number, f"{pair}, found {line[:80]!r}")
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
    return _open_rows(root / "label.txt", folder, _challenge_rows(root / "label.txt"), "")


def _csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a manifest, checked one by one."""
    text = read_text(path, "a CSV manifest")
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        columns = reader.fieldnames or []
        if not {"image", "label"} <= set(columns):
            found = ", ".join(columns) or "nothing"
            raise UserError(f"{path}: expected the columns image,label[,split], found {found}.")
        for fields in reader:
            yield _csv_row(path, reader.line_num, fields)
    except csv.Error as error:
        raise _fault(path, reader.reader.line_num, f"CSV, found {error}") from None


def _csv_row(path: Path, line: int, fields: dict[str | Any, str | Any]) -> Row:
    image, *others = (fields.get(name) or "" for name in ("image", "label", "split"))
    label, split = (each.strip() for each in others)
    if None in fields or not image or not label:
        count = len(fields.keys() - {None})
        raise _fault(path, line, f"{count} filled cells, found {[*fields.values()]}")
    if "split" in fields and split not in SPLITS:
        raise _fault(path, line, f"the split {', '.join(SPLITS)}, found {split!r}")
    if _NUMERIC.fullmatch(label) and not label.isdigit():
        raise _fault(path, line, f"an integer from 0 on or a name as label, found {label!r}")
    return Row(line, image, label, split)


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
    divided = rows[0].split or split == "val"
    return _open_rows(path, path.parent, rows, split if divided else "")
