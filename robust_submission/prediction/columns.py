"""A prediction file's rows as columns, with the faults that a row shows by itself."""

import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeGuard

import numpy as np
from tqdm import tqdm

from robust_submission.prediction.foreign import foreign_columns, without_columns
from robust_submission.prediction.reader import Fault, Reporter, csv_rows, json_entries, shorten
from robust_submission.prediction.schema import (
    HEADER,
    JSON_KEYS,
    LABEL_COLUMN,
    Layout,
    column_order,
)

_DECIMAL = re.compile(r"[0-9.eE+-]+")
_Cells = tuple[int, str | int | None, str | int | None, Sequence[str] | Sequence[float]]
"""Line, id, label, one probability per class; None or () where the row has none to be read."""


@dataclass(kw_only=True)
class PredictionColumns:
    """All rows (N,)."""

    report: Reporter
    class_names: Sequence[str]
    """Names in label order (C,): as expected, else the file's own."""
    entries: bool
    """Whether rows are entries of a JSON array."""
    lines: list[int] = field(default_factory=list)
    ids: list[str | int | None] = field(default_factory=list)
    labels: list[str | int | None] = field(default_factory=list)
    _shares: "array[float]" = field(default_factory=lambda: array("f"))
    _shared: list[int] = field(default_factory=list)

    def probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows that have probabilities from 0 to 1 (R,), and those, float32 (R, C)."""
        shares = np.frombuffer(self._shares, np.float32)
        return np.array(self._shared, int), shares.reshape(len(self._shared), len(self.class_names))

    def fault(self, row: int, kind: str, expected: str, found: str, fix: str) -> None:
        """Report a fault of row `row`, from 0."""
        entry = row + 1 if self.entries else None
        self.report(Fault(kind, self.lines[row], expected, found, fix, entry))

    def read(self, rows: Iterable[_Cells]) -> None:
        for row, (line, name, label, cells) in enumerate(
            tqdm(rows, unit=" rows", disable=None, delay=2)
        ):
            self.lines.append(line)
            self.ids.append(name)
            self.labels.append(label)
            shares = [*map(_share, cells)]
            if math.nan in shares:  # by identity
                fix = "write the softmax of the logits, in decimals such as 0.25"
                found = shorten(cells[shares.index(math.nan)])
                self.fault(row, "probability", "probabilities from 0 to 1", found, fix)
            elif shares:
                self._shares.extend(shares)
                self._shared.append(row)


def _share(cell: str | float) -> float:
    """A probability; `math.nan` itself for anything but a number from 0 to 1."""
    if isinstance(cell, str):
        try:
            cell = float(cell) if _DECIMAL.fullmatch(cell) else math.nan
        except ValueError:
            return math.nan
    return cell if 0 <= cell <= 1 else math.nan


def read_columns(path: Path, layout: Layout, report: Reporter) -> PredictionColumns:
    """Read a prediction file.

    Faults: those of `reader.csv_rows` or `reader.json_entries`; columns that do not belong there; a
    wrong header; a row with another number of cells; an entry with other keys or types; an id or a
    probability that is none.

    Raises:
        UserError: the file cannot be read.
    """
    names = layout.class_names or _numbers(layout.num_classes)
    columns = PredictionColumns(report=report, class_names=names, entries=layout.format == "json")
    columns.read((_json_cells if columns.entries else _csv_cells)(path, layout, columns))
    return columns


def _numbers(count: int | None) -> list[str]:
    return [str(label) for label in range(count or 0)]


def _csv_cells(path: Path, layout: Layout, columns: PredictionColumns) -> Iterator[_Cells]:
    report, stream = columns.report, iter(csv_rows(path, columns.report))
    first, top = next(stream, (1, []))
    if not top:
        return
    headless = layout.format == "neurips"
    if not headless:
        foreign = [*foreign_columns(top, _columns_known(top, layout))]
        for one in foreign:
            report(Fault(one.kind, first, f"no {one.kind}", shorten(one.name), one.fix))
        stream = iter(without_columns(chain([(first, top)], stream), foreign))
        first, top = next(stream)
    check = _check_no_header if headless else _check_header
    order, is_header = check(first, top, layout, report)
    # In a CSV a wrong header still says how many columns there are.
    width = 1 + len(order) if headless else max(2, len(top))
    if len(order) > 1 and not layout.class_names:
        names = top[2:] if is_header else map(str, order[1:])
        columns.class_names = [name.removeprefix("p_") for name in names]
    labelled = order[0] == LABEL_COLUMN
    places = [1 + order.index(label) for label in sorted(order)[labelled:]]
    for line, cells in stream if is_header else chain([(first, top)], stream):
        name, label = cells[0] or None if cells else None, None
        shares: Sequence[str] = ()
        if cells and name is None:
            fix = "write the image's file name"
            report(Fault("id", line, "an id", "an empty cell", fix))
        if len(cells) == width:
            label = cells[1] if labelled else None
            shares = [cells[place] for place in places]
        else:
            fix = "write one cell per column; quote a cell that holds a comma"
            found = f"{len(cells)}: {shorten(cells)}"
            report(Fault("cells", line, f"{width} cells", found, fix))
        yield line, name, label, shares


def _columns_known(top: list[str], layout: Layout) -> Callable[[str], bool]:
    """Which columns may be there. All, if the first row is no header that has those wanted, or has
    more than two others: then the header is wrong as a whole."""
    wanted = {*(layout.header or HEADER)}
    others = {*top[1:]} - wanted - {""}
    allowed = {name for name in others if name.startswith("p_")}
    if layout.from_template or layout.is_score:
        allowed = set[str]()
    elif layout.class_names:
        allowed |= {*layout.class_names, *_numbers(len(layout.class_names))}
    elif not allowed and len(others) > 1:  # the names of classes
        allowed = others
    if not wanted <= {*top} or len(others - allowed) > 2:
        return lambda name: True
    return lambda name: name in wanted or name in allowed


def _check_no_header(
    line: int, cells: list[str], layout: Layout, report: Reporter
) -> tuple[Sequence[int], bool]:
    """See `_check_header`; probability columns are known by their number or by what they hold."""
    if is_header := tuple(cells[:2]) == HEADER:
        report(Fault("header", line, "no header", shorten(",".join(cells)), "delete the line"))
    extra, count = len(cells) - 2, layout.num_classes
    decimals = extra > 1 and all(map(_DECIMAL.fullmatch, cells[2:]))
    with_shares = extra == count or (count is None and decimals)
    return [LABEL_COLUMN, *range(extra if with_shares else 0)], is_header


def _check_header(
    line: int, cells: list[str], layout: Layout, report: Reporter
) -> tuple[Sequence[int], bool]:
    """(what follows the id: `LABEL_COLUMN` or a class; whether the row is a header)."""
    fix = "write this line as the first"
    if layout.header and (layout.from_template or layout.is_score):
        wanted, order = [*layout.header], [*layout.columns]
    else:
        fix += "; if the contest wants another, give its --template"
        names = [name.removeprefix("p_") for name in cells[2:]]
        known = layout.class_names or names
        if layout.num_classes not in (None, len(known)):
            known = _numbers(layout.num_classes)
        classes = column_order(names, known) if names else []
        order = None if classes is None else [LABEL_COLUMN, *classes]
        columns = names if order else known if names else []
        wanted = [*HEADER, *(f"p_{name}" for name in columns)]
    if order and cells == wanted:
        return order, True
    number = len(cells) > 1 and cells[1].strip().replace(".", "", 1).isdecimal()
    is_row = number or cells[0] in layout.ids
    found = f"{'a row, ' if is_row else ''}{shorten(','.join(cells))}"
    report(Fault("header", line, f"the header {shorten(','.join(wanted))}", found, fix))
    return order if order and layout.is_score else [LABEL_COLUMN], not is_row


def _json_cells(path: Path, layout: Layout, columns: PredictionColumns) -> Iterator[_Cells]:
    *required, listed = JSON_KEYS
    line, number, keys = 1, 0, {*required}

    def fault(kind: str, expected: str, found: object, fix: str) -> None:
        columns.report(Fault(kind, line, expected, shorten(found), fix, number))

    for number, (line, entry) in enumerate(json_entries(path, columns.report), 1):
        found: dict[str, object] = entry if isinstance(entry, dict) else {}
        if number == 1 and listed in found:
            keys = {*JSON_KEYS}
        if found.keys() != keys:
            fix, wanted = "write these keys, each once, and no others", JSON_KEYS[: len(keys)]
            fault("keys", f"an object of {', '.join(wanted)}", entry, fix)
        integers = [_natural(found.get(key)) for key in required]
        for key in required if None in integers else ():
            if key in found and _natural(found[key]) is None:
                fix = "write the number without quotes, sign, point or exponent"
                fault(key, f"an integer from 0 as {key}", found[key], fix)
        shares: Sequence[float] = ()
        if listed in keys and listed in found:
            values = found[listed]
            if isinstance(values, list):
                columns.class_names = columns.class_names or _numbers(len(values))
            count = len(columns.class_names)
            if _are_numbers(values, count):
                shares = values
            else:
                wanted = f"a list of {count} numbers" if count else "a list of numbers"
                fault(listed, wanted, values, "write one number for every class")
        yield line, integers[0], integers[1], shares


def _natural(value: object) -> int | None:
    """An integer from 0; no bool, no float."""
    return value if type(value) is int and value >= 0 else None


def _are_numbers(values: object, count: int) -> TypeGuard[list[float]]:
    if not isinstance(values, list) or len(values) != count:
        return False
    return bool(values) and all(type(value) in (int, float) for value in values)
