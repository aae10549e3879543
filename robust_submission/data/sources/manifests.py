"""Data sets that a text file lists: the challenge's label.txt, and CSV manifests."""

import csv
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np

from robust_submission.cli.documents import find_delimiter, read_file, text_encoding
from robust_submission.cli.errors import UserError
from robust_submission.data.sources.folders import list_files, require_folder
from robust_submission.data.sources.names import (
    LABEL,
    SPLIT_OF,
    SPLITS,
    is_litter,
    name_splits,
    number_labels,
    say_left_out,
)
from robust_submission.data.sources.source import FileSource

_NUMERIC = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


class Row(NamedTuple):
    """One line of a file: where it stands, the image's path, its label as written, its split."""

    file: Path
    line: int
    image: str
    label: str
    split: str


def read_text(path: Path, what: str) -> str:
    """A text file in UTF-8 or UTF-16; UserError if it cannot be read."""
    try:
        content = read_file(path, what)
        return content.decode(text_encoding(content[:2])).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected {what} in UTF-8, found other bytes.") from None


def _fault(path: Path, line: int, message: str) -> UserError:
    return UserError(f"{path}: line {line}: expected {message}.")


def _open_rows(path: Path, folder: Path, rows: list[Row], split: str) -> FileSource:
    """The images of a split; each is listed once, however its path is written, and is there."""
    litter = {row.image for row in rows if any(map(is_litter, row.image.split("/")))}
    say_left_out(path, sorted(litter), "files that are no images")
    rows = [row for row in rows if row.image not in litter]
    lines = dict[str, Row]()
    for row in rows:
        first = lines.setdefault(os.path.normpath(folder / row.image), row)
        if first is not row:
            again = f"found {row.image!r} again (first in line {first.line})"
            raise _fault(row.file, row.line, f"each image once, {again}")
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        found = ", ".join(sorted({row.split for row in rows} - {""})) or "no column split"
        raise UserError(f"{path}: expected rows of the split {split}, found {found}.")
    ids = [_find_image(folder, row) for row in chosen]
    numbers, classes = number_labels(row.label for row in rows)
    return FileSource(
        folder=folder,
        ids=np.array(ids),
        labels=np.array([numbers[row.label] for row in chosen], dtype=np.int64),
        class_names=classes,
    )


def _find_image(folder: Path, row: Row) -> str:
    """The path of an image, whose name a list and macOS may write in two forms of Unicode."""
    for form in (row.image, normalize("NFC", row.image), normalize("NFD", row.image)):
        if os.path.isfile(folder / form):  # noqa: PTH113  # False, too, for a name that is too long
            return form
    raise _fault(row.file, row.line, f"the image {folder / row.image}, found nothing there")


def _challenge_rows(path: Path) -> list[Row]:
    rows = list[Row]()
    lines = read_text(path, "the challenge's label.txt").rstrip().splitlines()
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) != 2 or not LABEL.fullmatch(words[1]):
            pair = "a name and an integer label (0.JPEG 5)"
            raise _fault(path, number, f"{pair}, found {line[:80]!r}")
        rows.append(Row(path, number, words[0], words[1], ""))
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
    lines = read_text(path, "a CSV manifest").splitlines(keepends=True)
    delimiter = find_delimiter(lines[0] if lines else "")
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        columns = reader.fieldnames or []
        if "label" not in columns or not {"image", "image_name"} & set(columns):
            found = ", ".join(columns) or "nothing"
            raise UserError(f"{path}: expected the columns image,label[,split], found {found}.")
        for fields in reader:
            yield _csv_row(path, reader.line_num, fields)
    except csv.Error as error:
        raise _fault(path, reader.reader.line_num, f"CSV, found {error}") from None


def _image_column(columns: Iterable[str]) -> str:
    return "image" if "image" in columns else "image_name"


def _csv_row(path: Path, line: int, fields: dict[str | Any, str | Any]) -> Row:
    image, *others = (fields.get(name) or "" for name in (_image_column(fields), "label", "split"))
    label, split = (each.strip() for each in others)
    if None in fields or not image or not label:
        count = len(fields.keys() - {None})
        raise _fault(path, line, f"{count} filled cells, found {[*fields.values()]}")
    if "split" in fields and split.lower() not in SPLIT_OF:
        raise _fault(path, line, f"the split {', '.join(SPLITS)}, found {split!r}")
    if _NUMERIC.fullmatch(label) and not label.isdigit():
        raise _fault(path, line, f"an integer from 0 on or a name as label, found {label!r}")
    return Row(path, line, image, label, split.lower())


def _manifest_rows(path: Path) -> list[Row]:
    """The rows of a manifest, or of every labels.csv below a folder, as in shard_0/labels.csv.

    Paths are those from the manifest's folder, or from `path`. Images may stand in images/ there.
    """
    if not path.is_dir():
        return _rows_below(path, path.parent)
    names = [name for name in list_files(path) if name.rpartition("/")[2] == "labels.csv"]
    if not names:
        raise UserError(f"{path}: expected a CSV manifest, or labels.csv in a folder, found none.")
    return [row for name in sorted(names) for row in _rows_below(path / name, path)]


def _rows_below(path: Path, root: Path) -> list[Row]:
    rows, folder = list(_csv_rows(path)), path.parent
    if rows and not os.path.exists(folder / rows[0].image):  # noqa: PTH110  # False for a long name
        within = folder / "images"
        folder = within if os.path.exists(within / rows[0].image) else folder  # noqa: PTH110
    prefix = folder.relative_to(root)
    return [row._replace(image=str(prefix / row.image)) for row in rows] if prefix.parts else rows


def manifest_splits(path: Path) -> tuple[str, ...]:
    """Which of train, val and test are in the manifest's column split; () without that column."""
    return tuple(name_splits(path, {row.split for row in _manifest_rows(path)}))


def open_csv(path: Path, split: str) -> FileSource:
    """A manifest with the columns image,label[,split]; paths are relative to its folder.

    Labels that are all integers are taken as written, others are class names in string order;
    both over all splits. Without a column split, train and test both mean all of it.

    Raises:
        UserError: no such file or split, a missing column, an empty cell, a label that is
            another number, a double image, in whichever split, an image that is not there; with
            the number of the line.
    """
    rows = _manifest_rows(path)
    if not rows:
        raise UserError(f"{path}: expected a row for each image, found none.")
    splits = name_splits(path, {row.split for row in rows})
    if splits and (bare := next((row for row in rows if not row.split), None)):
        expected = "a column split, as other rows have one, found none"
        raise _fault(bare.file, bare.line, expected)
    divided = splits or split == "val"
    root = path if path.is_dir() else path.parent
    return _open_rows(path, root, rows, splits.get(split, split) if divided else "")
