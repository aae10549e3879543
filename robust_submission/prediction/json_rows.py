"""The entries of a JSON prediction file, with the line of each."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robust_submission.prediction.rows import (
    BOM,
    Fault,
    Report,
    report_bom,
    report_encoding,
    shorten,
)

END = "the end of the file"
_SPACE = re.compile(r"[ \t\r\n]*")


def _unique_keys(pairs: list[tuple[str, object]]) -> object:
    """A JSON object; one with a key twice stays a list of pairs, which no reader accepts."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else pairs


def _skip(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return space.end() if space else position


def _excerpt(text: str, position: int) -> str:
    return shorten(text[position : position + 41], 40) if position < len(text) else END


def json_rows(path: Path, report: Report) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) for each entry of a JSON file that holds one array.

    Reported: encoding, byte order mark, syntax (broken or truncated; nothing after it is read),
    not an array.
    """
    text = path.read_bytes().decode("utf-8", "surrogateescape").rstrip(" \t\r\n")
    report_bom(text, report)
    if not text.isascii():
        for number, line in enumerate(text.split("\n"), 1):
            report_encoding(number, line, report)
    position = _skip(text, len(BOM) if text.startswith(BOM) else 0)
    line = 1 + text.count("\n", 0, position)
    if text[position : position + 1] != "[":
        found, fix = _excerpt(text, position), "write one array of objects, in [ and ]"
        report(Fault("not an array", line, "a JSON array", found, fix))
        return
    entry = 1
    try:
        for place in _entries(text, position, line):
            yield place
            entry += 1
    except _SyntaxError as broken:
        line = 1 + text.count("\n", 0, broken.position)
        fix = "write the file again, whole; nothing after this place was checked"
        report(Fault("syntax", line, broken.expected, broken.found, fix, entry))


class _SyntaxError(Exception):
    def __init__(self, position: int, expected: str, found: str) -> None:
        super().__init__(expected)
        self.position, self.expected, self.found = position, expected, found


def _entries(text: str, position: int, line: int) -> Iterator[tuple[int, Any]]:
    """The values of the array that opens at `position`, each with its line."""
    decode = json.JSONDecoder(object_pairs_hook=_unique_keys).raw_decode
    start = _skip(text, position + 1)
    if closed := text[start : start + 1] == "]":
        start = _skip(text, start + 1)
    while not closed:
        line += text.count("\n", position, start)
        try:
            value, end = decode(text, start)
        except json.JSONDecodeError as error:
            found = END if error.msg.startswith("Unterminated") else _excerpt(text, error.pos)
            raise _SyntaxError(error.pos, "valid JSON up to a closing ]", found) from error
        except (ValueError, RecursionError) as error:  # digits or nesting without end
            raise _SyntaxError(start, "a plain entry", str(error)) from error
        yield line, value
        position, after = start, _skip(text, end)
        closed = text[after : after + 1] == "]"
        if not closed and text[after : after + 1] != ",":
            raise _SyntaxError(after, "a comma or a closing ]", _excerpt(text, after))
        start = _skip(text, after + 1)
    if start < len(text):
        raise _SyntaxError(start, "nothing after the array", _excerpt(text, start))
