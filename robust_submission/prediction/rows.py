"""The rows of a CSV prediction file, with the line of each.

One fault does not hide the next: the readers hand it to `report` and go on where they can.
"""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

from robust_submission.cli.errors import UserError

BOM = "\ufeff"
_UNDECODED = re.compile("[\udc80-\udcff]")


class Fault(NamedTuple):
    """One thing wrong in a file: where, what was expected, what was found, how to fix it."""

    kind: str
    line: int | None
    expected: str
    found: str
    fix: str
    entry: int | None = None
    """The place in a JSON array, from 1: there a line may hold many entries."""

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line else "the whole file"
        if self.entry:
            place = f"{place}, entry {self.entry}"
        return f"{place}: expected {self.expected}, found {self.found}. Fix: {self.fix}."


Report = Callable[[Fault], None]


def raise_faults(path: Path, tolerated: tuple[str, ...] = ()) -> Report:
    """A `report` for readers that want a sound file: the first fault is a ValueError."""

    def report(fault: Fault) -> None:
        if fault.kind not in tolerated:
            raise UserError(f"{path}: {fault}")

    return report


def shorten(value: object, length: int = 80) -> str:
    """A value as it is shown in a message: in quotes where it is text, cut when long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


def report_encoding(line: int, text: str, report: Report) -> None:
    if wrong := _UNDECODED.search(text):
        byte = f"the byte 0x{ord(wrong[0]) - 0xDC00:02x}"
        report(Fault("encoding", line, "UTF-8 text", byte, "save the file as UTF-8"))


def report_bom(text: str, report: Report) -> None:
    if text.startswith(BOM):
        fix = "save the file as UTF-8 without a byte order mark"
        report(Fault("byte order mark", 1, "no byte order mark", "one (ef bb bf)", fix))


class _Lines:
    """The lines of a file; those of the current record can be read again."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._again = deque[str]()
        self.record = list[str]()
        self.number = 1  # of the record's first line

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self.record.append(line)
        return line

    def next_record(self) -> None:
        self.number += len(self.record)
        self.record.clear()

    def skip_line(self) -> None:
        """Go on after the record's first line."""
        self._again.extendleft(reversed(self.record[1:]))
        del self.record[1:]
        self.next_record()


def _report_syntax(line: int, message: str, text: str, report: Report) -> None:
    if "new-line" in message:
        fix = "end lines with LF"
        report(Fault("line end", line, "lines ended by LF or CRLF", "a lone CR", fix))
    else:
        fix = "close the quotes, and double the quotes inside a cell"
        report(Fault("quotes", line, "a closing quote before a comma", shorten(text), fix))


def csv_rows(path: Path, report: Report) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) for each row of a CSV file (RFC 4180; LF and CRLF alike).

    Bytes that are no UTF-8 come as surrogates. Reported: encoding, byte order mark, blank line,
    quotes, line end; the last three give no row.
    """
    # Lines end at LF only: a CR inside quotes is part of its cell.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        if file.read(1) == BOM:
            report_bom(BOM, report)
        else:
            file.seek(0)
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                _report_syntax(lines.number, str(error), lines.record[0].rstrip("\r\n"), report)
                lines.skip_line()
                reader = csv.reader(lines, strict=True)
                continue
            for text in lines.record:
                if not text.isascii():
                    report_encoding(lines.number, text, report)
            if not cells or (len(cells) == 1 and not cells[0].strip()):
                found = "a blank line"
                report(Fault("blank line", lines.number, "a row", found, "delete the line"))
            else:
                yield lines.number, cells
            lines.next_record()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A sound CSV file whose first column is the ids."""

    path: Path
    header: list[str] | None
    ids: list[str]
    lines: list[int]
    """Where each row stands (N,)."""
    cells: list[tuple[str, ...]]
    """The rows, ids included (N,)."""


def read_table(path: Path, header: bool, tolerated: tuple[str, ...] = ()) -> Table:
    """Read a whole CSV file.

    Raises:
        UserError: any fault of `csv_rows` that is not tolerated, no rows, a row with more or
            fewer cells than the first, an empty id, an id twice.
    """
    rows = csv_rows(path, raise_faults(path, tolerated))
    top, first = next(rows, (1, []))
    width = len(first)
    seen, table = dict[str, int](), list[tuple[str, ...]]()
    for line, cells in rows if header else chain([(top, first)], rows):
        if len(cells) != width or not cells[0]:
            found = f"{len(cells)}, the id {shorten(cells[0])}"
            raise UserError(f"{path}: line {line}: expected {width} cells, found {found}.")
        if (earlier := seen.setdefault(cells[0], line)) != line:
            found = f"{shorten(cells[0])} on line {earlier} too"
            raise UserError(f"{path}: line {line}: expected each id once, found {found}.")
        table.append(tuple(cells))
    if width < 2 or not table:
        expected = "a header and rows" if header else "rows"
        raise UserError(f"{path}: expected {expected} of an id and a label, found none.")
    return Table(
        path=path,
        header=first if header else None,
        ids=list(seen),
        lines=list(seen.values()),
        cells=table,
    )
