"""The user's files: what is no regular file is not waited for, and messages are short and clean."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from robust_submission.cli.documents import open_file, read_file, read_json, read_yaml, validated
from robust_submission.cli.errors import UserError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "expected a list, found nothing there."),
        (lambda path: path.mkdir(), "expected a list, found a folder."),
        (os.mkfifo, "expected a list, found a device or a pipe."),
        (lambda path: path.symlink_to("/dev/zero"), "expected a list, found a device or a pipe."),
        (lambda path: path.symlink_to(path), "a list that can be read, found: Too many levels"),
        (lambda path: path.write_bytes(b"x" * 99), "a list of at most 98 bytes, found 99."),
    ],
)
def test_regular_files_only(tmp_path: Path, make: Callable[[Path], None], message: str):
    path = tmp_path / "file"
    make(path)
    with pytest.raises(UserError) as raised:
        open_file(path, "a list", most=98)
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)


def test_what_may_not_be_read_is_not_called_missing(tmp_path: Path, monkeypatch):
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="a list that can be read, found: Permission denied"):
        open_file(tmp_path / "file", "a list")


def test_reads_what_is_there(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"a: &x [1, 2]\nb: [*x, *x]\n")
    assert read_file(tmp_path / "link", "a list") == b"a: &x [1, 2]\nb: [*x, *x]\n"
    assert read_yaml(tmp_path / "link", "a list") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    (tmp_path / "file").write_text('{"a": 1e3, "b": [NaN]}')
    assert str(read_json(tmp_path / "file", "a list")) == "{'a': 1000.0, 'b': [nan]}"


@pytest.mark.parametrize("text", ["{", "[" * 50_000, '"\\ud800"', '{"a": 01}', "\xff", ""])
def test_what_is_no_json(tmp_path: Path, text: str):
    (tmp_path / "file").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"^{tmp_path}/file: expected a list in JSON, found: "):
        read_json(tmp_path / "file", "a list")


class Lists(BaseModel, extra="forbid", strict=True):
    names: list[str]
    size: Annotated[int, Field(ge=1)] = 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "F: names: expected this key, found none."),
        ({"names": ["a"], "more": 3}, "F: more: expected no such key, found 3."),
        ({"names": ["a", 5]}, "F: names.1: expected a valid string, found 5."),
        ({"names": [], "size": True}, "F: size: expected a valid integer, found True."),
        ({"names": [], "size": 0}, "F: size: expected greater than or equal to 1, found 0."),
        ({"names": "x" * 999}, f"F: names: expected a valid list, found '{'x' * 79}…."),
        ([], "F: expected a valid dictionary, found []."),
    ],
)
def test_the_key_is_named(values: object, message: str):
    with pytest.raises(UserError) as raised:
        validated(Lists, values, "F")
    assert str(raised.value) == message
    assert validated(Lists, {"names": ["a"]}, "F").names == ["a"]


def test_messages_are_short_and_clean():
    error = UserError("F: expected \x1b[2Jx, found a\u202eb\ud800\nand \u00e9\N{NO-BREAK SPACE}L∞")
    assert str(error) == (
        "F: expected \\x1b[2Jx, found a\\u202eb\\ud800\nand \u00e9\N{NO-BREAK SPACE}L∞"
    )
    assert str(UserError(f"F: expected x, found {'9' * 10**6}.")) == (
        f"F: expected x, found {'9' * 79}…"
    )
    assert len(str(UserError("F" * 10**6))) < 500
