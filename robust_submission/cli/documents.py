"""The user's files, read: regular files of bounded size; JSON and YAML, checked by pydantic; text.

Whatever is wrong with one is a UserError that names the file, the key, what was expected and what
was found. A file may be a stranger's: nothing here waits for a pipe, reads a device, or takes more
time or memory than the bounds allow.
"""

import codecs
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from robust_submission.cli.errors import UserError, shorten

MEBIBYTE = 2**20
LARGEST = 2**10 * MEBIBYTE
"""Bytes of a file."""
LARGEST_YAML = MEBIBYTE // 4
"""A recipe has some kilobytes."""
MOST_NODES = 10_000
"""Values in a YAML file, those behind aliases counted each time."""
DEEPEST = 20
"""Levels of a YAML file."""
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""Of the cells of a CSV file."""

Checked = TypeVar("Checked")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def open_file(path: Path, what: str, most: int = LARGEST) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: The file.
        what: What was expected there, for the message.
        most: Bytes that it may have.

    Raises:
        UserError: nothing is there, it cannot be read, it is a folder, a device or a pipe, or it is
            larger.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: expected {what}, found nothing there.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        found = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: expected {what} that can be read, found: {found}.") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= most:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    found = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
    if stat.S_ISREG(status.st_mode):
        what, found = f"{what} of at most {most:,} bytes", f"{status.st_size:,}"
    raise UserError(f"{path}: expected {what}, found {found}.")


def read_file(path: Path, what: str, most: int = LARGEST) -> bytes:
    """The bytes of a regular file; see `open_file`."""
    with open_file(path, what, most) as file:
        try:
            return file.read()
        except OSError as error:
            found = error.strerror or error
            raise UserError(f"{path}: expected {what} that can be read, found: {found}.") from error


def text_encoding(head: bytes) -> str:
    """The encoding of a file that begins with these bytes: UTF-8, or a kind of UTF-16.

    Excel's "Unicode text" and the `>` of Windows PowerShell write UTF-16.
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if 0 in head[:2]:  # no text begins with the character 0
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8"


def find_delimiter(first_line: str) -> str:
    """What separates the cells: a comma, or where the first line has none, a semicolon or a tab."""
    return next((mark for mark in DELIMITERS if mark in first_line), ",")


def read_json(path: Path, what: str, most: int = 64 * MEBIBYTE) -> Any:
    """The value in a JSON file; see `open_file`.

    Raises:
        UserError: it cannot be read, is no JSON, or is nested 200 levels deep.
    """
    content = read_file(path, what, most)
    try:
        return from_json(content)
    except ValueError as error:
        raise UserError(f"{path}: expected {what} in JSON, found: {error}.") from error


def read_yaml(path: Path, what: str) -> Any:
    """The value in a YAML file; see `open_file`.

    Raises:
        UserError: it cannot be read, is no YAML, or is larger or deeper than the bounds.
    """
    content = read_file(path, what, LARGEST_YAML)
    try:
        fault = _excess(content)
        value = None if fault else yaml.load(content, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        found = " ".join(str(error).split())
        raise UserError(f"{path}: expected {what} in YAML, found: {found}.") from error
    if fault:
        raise UserError(f"{path}: expected {what} of {fault}.")
    return value


def _excess(content: bytes) -> str:
    """By what a YAML text exceeds the bounds; nothing is built. Empty if it is within them."""
    total, sizes = 0, dict[str, int]()  # of finished anchors
    open_ones = list[tuple[str | None, int]]()
    for event in yaml.parse(content, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                return f"aliases for what is complete, found *{event.anchor}"
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            sizes |= {anchor: total - before} if anchor else {}
        if len(open_ones) > DEEPEST:
            return f"at most {DEEPEST} levels, found more"
        if total > MOST_NODES:
            return f"at most {MOST_NODES:,} values, found more"
    return ""


def validated(kind: type[Checked], values: object, place: object = "") -> Checked:
    """`values` as an object of `kind`, as pydantic understands it.

    Args:
        kind: A type that pydantic can check.
        values: What a file or a caller gives.
        place: The file, for the message; none where the keys say enough.

    Raises:
        UserError: the first fault, "PLACE: KEY: expected …, found …".
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        words = [str(part) for part in first["loc"]]
        names = ": ".join(filter(None, (str(place), ".".join(words))))
        raise UserError(f"{names}: expected {_expected(first)}.") from error


def _expected(error: ErrorDetails) -> str:
    """`a valid integer, found 'x'`, of one fault that pydantic finds."""
    if error["type"] == "missing":
        return "this key, found none"
    found = f"found {shorten(error['input'])}"
    if error["type"] == "extra_forbidden":
        return f"no such key, {found}"
    text = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    text = text.partition(" or instance of ")[0]
    return f"{text[:1].lower()}{text[1:]}, {found}"
