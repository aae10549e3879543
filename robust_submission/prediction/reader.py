"""The rows of a CSV file and the entries of a JSON file, each with its line.

One fault does not hide the next: the readers pass it to `report` and continue where they can.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from robust_submission.cli.documents import DELIMITERS, find_delimiter, open_file, text_encoding
from robust_submission.cli.errors import shorten

BYTE_ORDER_MARK = "\ufeff"
_UNDECODED = re.compile("[\udc80-\udcff]")
_JSON_SPACE = " \t\r\n"
_JSON_MARK = re.compile(rf"[{_JSON_SPACE}]*([][,])[{_JSON_SPACE}]*")


class Fault(NamedTuple):
    """One thing wrong in a file: where, what was expected, what was found, how to fix it."""

    kind: str
    line: int | None
    """From 1; None for a fault of the whole file."""
    expected: str
    found: str
    fix: str
    entry: int | None = None
    """The place in a JSON array, from 1: one line may hold many entries."""

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line else "the whole file"
        if self.entry:
            place = f"{place}, entry {self.entry}"
        return f"{place}: expected {self.expected}, found {self.found}. Fix: {self.fix}."


Reporter = Callable[[Fault], None]


def _text_lines(path: Path, report: Reporter) -> Iterator[str]:
    """The lines of a file, each with its LF; bytes that are not UTF-8 become surrogates. UTF-16 is
    a fault, and read.

    Lines end at LF only: a CR inside quotes is part of its cell.

    Raises:
        UserError: the file cannot be read.
    """
    opened = open_file(path, "a file")
    encoding = text_encoding(opened.read(2))
    opened.seek(0)
    if encoding != "utf-8":
        fix = "save the file as UTF-8 (in Excel as CSV UTF-8)"
        report(Fault("UTF-16", 1, "UTF-8 text", "UTF-16", fix))
    errors = "surrogateescape" if encoding == "utf-8" else "replace"
    with io.TextIOWrapper(opened, encoding, errors, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(BYTE_ORDER_MARK):
                line = line.removeprefix(BYTE_ORDER_MARK)
                expected, fix = "no byte order mark", "save the file as UTF-8 without one"
                report(Fault("byte order mark", 1, expected, "one (ef bb bf)", fix))
            if not line.isascii() and (wrong := _UNDECODED.search(line)):
                found = f"the byte 0x{ord(wrong[0]) - 0xDC00:02x}"
                report(Fault("encoding", number, "UTF-8 text", found, "save it as UTF-8"))
            yield line


def csv_rows(path: Path, report: Reporter) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) for each row of a CSV file (RFC 4180; LF and CRLF alike), also of one
    that has another delimiter.

    Faults: encoding, UTF-16, byte order mark, delimiter; blank line, quotes, line end, which give
    no row.

    Raises:
        UserError: the file cannot be read.
    """
    lines = list(_text_lines(path, report))
    delimiter = find_delimiter(lines[0] if lines else "")
    if delimiter != ",":
        found, fix = DELIMITERS[delimiter], "save the file with commas"
        report(Fault("delimiter", 1, "cells separated by commas", found, fix))
    start, reader = 0, csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first = start + reader.line_num  # the record's first line, from 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report(_csv_syntax(first + 1, lines[first], str(error)))
            start = first + 1  # only that line is lost
            rest = map(lines.__getitem__, range(start, len(lines)))
            reader = csv.reader(rest, delimiter=delimiter, strict=True)
            continue
        if len(cells) > 1 or "".join(cells).strip():
            yield first + 1, cells
        else:
            report(Fault("blank line", first + 1, "a row", "a blank line", "delete the line"))


def _csv_syntax(line: int, text: str, message: str) -> Fault:
    if "new-line" in message:
        expected = "lines ended by LF or CRLF"
        return Fault("line end", line, expected, "a lone CR", "end lines with LF")
    fix = "close the quotes, and double the quotes inside a cell"
    found = shorten(text.rstrip("\r\n"))
    return Fault("quotes", line, "a closing quote before a comma", found, fix)


def json_entries(path: Path, report: Reporter) -> Iterator[tuple[int, object]]:
    """Yield (line, value) for each entry of a JSON file that holds one array.

    An object with a key twice comes as its list of pairs, which no check takes for an object.
    Faults: encoding, byte order mark, syntax; nothing after the last is read.

    Raises:
        UserError: the file cannot be read.
    """
    text = "".join(_text_lines(path, report)).rstrip(_JSON_SPACE)
    decode = json.JSONDecoder(object_pairs_hook=_unique_keys).raw_decode
    line, entry, former, start = 1, 1, 0, 0
    try:
        mark, start = _next_mark(text, 0, "[")
        if text.startswith("]", start):
            mark, start = _next_mark(text, start, "]")
        while mark != "]":
            line += text.count("\n", former, start)
            value, end = decode(text, former := start)
            yield line, value
            entry += 1
            mark, start = _next_mark(text, end, ",]")
        if start < len(text):
            raise json.JSONDecodeError("", text, start)
    except (ValueError, RecursionError) as error:  # also digits or nesting without end
        place = error.pos if isinstance(error, json.JSONDecodeError) else start
        rest = text[place : place + 41]
        found = shorten(rest, 40) if rest else "the end of the file"
        fix = "write the file again, whole; nothing after this place was checked"
        line, wanted = 1 + text.count("\n", 0, place), "one array in valid JSON, up to its ]"
        report(Fault("syntax", line, wanted, found, fix, entry))


def _unique_keys(pairs: list[tuple[str, object]]) -> object:
    found = dict(pairs)
    return found if len(found) == len(pairs) else pairs


def _next_mark(text: str, position: int, allowed: str) -> tuple[str, int]:
    """The next character, one of those allowed, and where the text after it begins."""
    found = _JSON_MARK.match(text, position)
    if not found or found[1] not in allowed:
        rest = text[position:]
        raise json.JSONDecodeError("", text, len(text) - len(rest.lstrip(_JSON_SPACE)))
    return found[1], found.end()
