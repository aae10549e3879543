"""Reads a prediction file row by row: the faults that a row shows alone, and what rows share."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from robust_submission.prediction.faults import Faults
from robust_submission.prediction.formats import JSON_KEYS
from robust_submission.prediction.json_rows import json_rows
from robust_submission.prediction.layout import HEADER, LABEL, Layout, column_order
from robust_submission.prediction.rows import Fault, csv_rows, shorten

TOLERANCE = 1e-3  # of a sum: six decimals err by 5e-7 a class at most
NONE = -1  # no class, no label
_DECIMALS = re.compile(r"[0-9.eE+,-]*")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is known of a prediction file before it is read."""

    format: str
    class_names: Sequence[str] = ()
    """Names in label order; empty where unknown."""
    num_classes: int | None = None
    layout: Layout | None = None
    """From the template or the images, where given."""
    prescribed: bool = False
    """Whether a template prescribes header, order and kind of label."""
    named: bool = False
    """Whether the template's labels are class names."""


@dataclass(kw_only=True)
class Rows:
    """All rows of a prediction file."""

    faults: Faults
    class_names: Sequence[str]
    entries: bool = False
    """Whether rows are entries of a JSON array."""
    lines: list[int] = field(default_factory=list)
    ids: dict[Any, int] = field(default_factory=dict)
    """The first row of each id, in the order of the file."""
    codes: dict[Any, int] = field(default_factory=dict)
    """The code of each label as it is written."""
    labels: list[int] = field(default_factory=list)
    """The code of each row, or `NONE`."""
    best: list[int] = field(default_factory=list)
    """The most probable class of each row, or `NONE`."""
    ties: dict[int, list[int]] = field(default_factory=dict)
    """Rows with several most probable classes."""

    def fault(self, row: int, kind: str, expected: str, found: str, fix: str) -> None:
        entry = row + 1 if self.entries else None
        self.faults.add(Fault(kind, self.lines[row], expected, found, fix, entry))

    def add_id(self, row: int, name: str | int) -> None:
        if (first := self.ids.setdefault(name, row)) != row:
            place = f"entry {first + 1}" if self.entries else f"line {self.lines[first]}"
            found = f"{shorten(name)} on {place} already"
            self.fault(row, "duplicated id", "each id once", found, "delete one of the two")

    def add_shares(self, row: int, shares: list[float], classes: Sequence[int]) -> None:
        """Check one row's probabilities and note which class is the most probable."""
        wrong = next((share for share in shares if not 0 <= share <= 1), None)
        if wrong is not None:
            fix = "write the softmax of the logits"
            self.fault(row, "probability", "probabilities from 0 to 1", shorten(wrong), fix)
        elif abs((total := sum(shares)) - 1) > TOLERANCE:
            fix = "write one probability for every class"
            self.fault(row, "sum", "probabilities that sum to 1", f"a sum of {total:.6f}", fix)
        else:
            most = max(shares)
            self.best[row] = classes[shares.index(most)]
            if shares.count(most) > 1:
                self.ties[row] = [classes[i] for i, share in enumerate(shares) if share == most]


def _numbers(expected: Expected) -> list[str]:
    return [str(label) for label in range(expected.num_classes or 0)]


def _looks_like_data(cells: list[str], expected: Expected) -> bool:
    known = bool(expected.layout) and cells[0] in expected.layout.ids
    return known or (len(cells) > 1 and cells[1].strip().isdecimal())


def _wanted_header(
    cells: list[str], expected: Expected
) -> tuple[Sequence[str], Sequence[int] | None]:
    """(the header that is wanted; what follows the id if `cells` are that header, or None)."""
    if expected.prescribed and expected.layout and expected.layout.header:
        wanted = list(expected.layout.header)
        return wanted, expected.layout.columns if cells == wanted else None
    names = [name.removeprefix("p_") for name in cells[2:]]
    if not names:
        return HEADER, [LABEL] if tuple(cells) == HEADER else None
    known = expected.class_names or names
    if expected.num_classes not in (None, len(known)):
        known = _numbers(expected)
    wanted = [*HEADER, *(f"p_{name}" for name in known)]
    classes = column_order(names, known)
    same = tuple(cells[:2]) == HEADER and all(name.startswith("p_") for name in cells[2:])
    return wanted, [LABEL, *classes] if same and classes is not None else None


def _check_header(
    cells: list[str], line: int, expected: Expected, faults: Faults
) -> tuple[Sequence[int], bool]:
    """(what follows the id: `LABEL` or a class; whether the row is a header)."""
    wanted, columns = _wanted_header(cells, expected)
    if columns is not None:
        return columns, True
    fix = "write this line as the first"
    if not expected.prescribed:
        fix += "; if the contest wants another, give its --template"
    is_header = not _looks_like_data(cells, expected)
    found = shorten(",".join(cells)) if is_header else f"a row, {shorten(','.join(cells))}"
    faults.add(Fault("header", line, f"the header {shorten(','.join(wanted))}", found, fix))
    return [LABEL], is_header


def _columns_without_header(cells: list[str], expected: Expected) -> Sequence[int]:
    extra = len(cells) - 2
    numbers = all(_DECIMALS.fullmatch(cell) for cell in cells[2:])
    count = expected.num_classes
    if extra > 0 and (extra == count or (count is None and extra > 1 and numbers)):
        return [LABEL, *range(extra)]
    return [LABEL]


def gather_csv(path: Path, expected: Expected, faults: Faults) -> Rows:
    """The rows of a CSV, with or without a header."""
    stream = csv_rows(path, faults.add)
    line, cells = next(stream, (1, []))
    rows = Rows(faults=faults, class_names=expected.class_names)
    if not cells:
        return rows
    if expected.format == "csv":
        columns, is_header = _check_header(cells, line, expected, faults)
    else:
        columns, is_header = _columns_without_header(cells, expected), tuple(cells[:2]) == HEADER
        if is_header:
            found = shorten(",".join(cells))
            faults.add(Fault("header", line, "no header", found, "delete the line"))
    width = 1 + len(columns)
    if len(columns) > 1 and not rows.class_names:
        names = cells[2:] if is_header else map(str, range(len(columns) - 1))
        rows.class_names = [name.removeprefix("p_") for name in names]
    elif expected.format == "csv":
        width = max(2, len(cells))  # a wrong header still says how many columns there are
    rows.class_names = rows.class_names or _numbers(expected)
    _gather_cells(chain([] if is_header else [(line, cells)], stream), columns, width, rows)
    return rows


def _gather_cells(
    stream: Iterator[tuple[int, list[str]]], columns: Sequence[int], width: int, rows: Rows
) -> None:
    labelled = columns[0] == LABEL
    first = 2 if labelled else 1
    classes = columns[first - 1 :]
    for row, (line, cells) in enumerate(tqdm(stream, unit=" rows", disable=None, delay=2)):
        rows.lines.append(line)
        rows.best.append(NONE)
        rows.add_id(row, cells[0])
        if len(cells) != width:
            rows.labels.append(NONE)
            fix = "one cell a column; quote a cell that holds a comma"
            rows.fault(row, "cells", f"{width} cells", f"{len(cells)}: {shorten(cells)}", fix)
            continue
        rows.labels.append(rows.codes.setdefault(cells[1], len(rows.codes)) if labelled else NONE)
        if classes:
            _add_cells(rows, row, cells[first:], classes)


def _add_cells(rows: Rows, row: int, cells: list[str], classes: Sequence[int]) -> None:
    """The probabilities of a CSV's row."""
    try:
        if not _DECIMALS.fullmatch(",".join(cells)):
            raise ValueError
        rows.add_shares(row, [float(cell) for cell in cells], classes)
    except ValueError:
        wrong = next(cell for cell in cells if not _is_number(cell))
        rows.fault(
            row, "probability", "numbers from 0 to 1", shorten(wrong), "write decimals: 0.25"
        )


def _is_number(cell: str) -> bool:
    try:
        return bool(_DECIMALS.fullmatch(cell)) and float(cell) == float(cell)
    except ValueError:
        return False


def gather_json(path: Path, expected: Expected, faults: Faults) -> Rows:
    """The entries of a JSON array."""
    class_names = expected.class_names or _numbers(expected)
    rows = Rows(faults=faults, class_names=class_names, entries=True)
    stream = json_rows(path, faults.add)
    with_shares = False
    for row, (line, entry) in enumerate(tqdm(stream, unit=" entries", disable=None, delay=2)):
        rows.lines.append(line)
        rows.best.append(NONE)
        rows.labels.append(NONE)
        if row == 0:
            with_shares = isinstance(entry, dict) and JSON_KEYS[2] in entry
        _add_entry(rows, row, entry, JSON_KEYS if with_shares else JSON_KEYS[:2])
    return rows


def _add_entry(rows: Rows, row: int, entry: Any, keys: Sequence[str]) -> None:
    if not isinstance(entry, dict) or entry.keys() != set(keys):
        fix = "these keys, each once, no others"
        rows.fault(row, "keys", f"an object of {', '.join(keys)}", shorten(entry), fix)
        entry = entry if isinstance(entry, dict) else {}
    for key in keys[:2]:
        value = entry.get(key, 0)
        if type(value) is not int:
            fix = "write the number without quotes, point or exponent"
            rows.fault(row, key, f"an integer as {key}", shorten(value), fix)
        elif key in entry and key == keys[0]:
            rows.add_id(row, value)
        elif key in entry:
            rows.labels[row] = rows.codes.setdefault(value, len(rows.codes))
    if len(keys) > 2 and keys[2] in entry:
        _add_list(rows, row, entry[keys[2]])


def _add_list(rows: Rows, row: int, shares: Any) -> None:
    """The probabilities of a JSON's entry."""
    if isinstance(shares, list) and not rows.class_names:
        rows.class_names = [str(label) for label in range(len(shares))]
    count = len(rows.class_names)
    sound = isinstance(shares, list) and len(shares) == count > 0
    if not sound or any(type(share) not in (int, float) for share in shares):
        fix = "write one number for every class"
        wanted = f"a list of {count} numbers" if count else "a list of numbers"
        rows.fault(row, "probabilities", wanted, shorten(shares), fix)
    else:
        rows.add_shares(row, shares, range(count))
