"""Unpack a stranger's zip; every entry is checked before the first byte is written."""

import lzma
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from robust_submission.cli.documents import open_file
from robust_submission.cli.files import FULL
from robust_submission.data.sources.names import is_litter

CODED = (zlib.error, lzma.LZMAError, UnicodeDecodeError)
DAMAGE = (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, *CODED)
"""What zipfile raises for a damaged archive or an unknown compression."""
NEEDLESS = (".pyc", ".pyo", ".ipynb", ".log")
PACKAGE = Path(__file__).parents[1]
ROUTINE = 10 << 20  # smaller entries may shrink as much as they like


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What an archive may grow to."""

    total: int = 1 << 30
    """Bytes in all."""
    files: int = 1000
    """Entries."""
    ratio: float = 100.0
    """Unpacked over packed size of an entry above 10 MiB; weights hardly shrink at all."""


BOUNDS = Bounds()


class RefusedError(ValueError):
    """An archive that is not unpacked. `fix` says what to do about it."""

    def __init__(self, expected: str, found: str, fix: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found, self.fix = expected, found, fix


def unpack(archive: Path, folder: Path, bounds: Bounds = BOUNDS) -> list[str]:
    """Unpack `archive` in the empty folder `folder`.

    Returns:
        The names of its files.

    Raises:
        UserError: see `open_file`.
        RefusedError: no zip, damaged, encrypted; an entry that is no plain file, leaves the folder
            or stands there twice; more than `bounds` allow.
    """
    try:
        with open_file(archive, "a zip file") as file, zipfile.ZipFile(file) as content:
            entries = [entry for entry in content.infolist() if not entry.filename.endswith("/")]
            _check_entries(entries, bounds)
            left = bounds.total
            for entry in entries:
                left -= _write(content, entry, folder, left)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise  # of the folder, not the archive
        raise RefusedError("a whole zip file", f"{error}", "zip it again and compare") from error
    return [_name(entry) for entry in entries]


def needless(files: list[str]) -> list[str]:
    """Files that no model needs."""
    return [
        name
        for name in files
        if name.lower().endswith(NEEDLESS) or any(map(is_litter, name.split("/")))
    ]


def foreign(folder: Path, files: list[str]) -> list[str]:
    """Files of an unpacked package that are neither data nor copies of this project's sources."""
    ours = {path.read_bytes() for path in PACKAGE.rglob("*.py")}
    code = [name for name in files if not name.endswith((".json", ".safetensors"))]
    return [each for each in code if each[-3:] != ".py" or (folder / each).read_bytes() not in ours]


def check_layout(files: list[str]) -> None:
    """Raise RefusedError unless model.py lies at the top."""
    found, fix = ", ".join(files[:3]) or "nothing", "add a model.py with a class Model"
    if nested := [name for name in files if name.endswith("/model.py")]:
        found = f"{nested[0]}, a folder too deep"
        fix = "zip from inside the folder: cd FOLDER && zip -r ../submission.zip ."
    if "model.py" not in files:
        raise RefusedError("model.py at the top level", found, fix)


def _name(entry: zipfile.ZipInfo) -> str:
    return str(PurePosixPath(entry.filename))  # "./model.py" is model.py


def _check_entries(entries: Sequence[zipfile.ZipInfo], bounds: Bounds) -> None:
    fix = "pack only model.py and its weights"
    if len(entries) > bounds.files:
        raise RefusedError(f"at most {bounds.files} files", f"{len(entries)}", fix)
    total = sum(entry.file_size for entry in entries)
    if total > bounds.total:
        found = f"{total / 2**20:,.0f} MiB unpacked (a zip bomb?)"
        raise RefusedError(f"at most {bounds.total / 2**20:,.0f} MiB unpacked", found, fix)
    names = [_name(entry).casefold() for entry in entries]
    for entry in entries:
        _check_entry(entry, bounds)
        if names.count(_name(entry).casefold()) > 1:
            raise RefusedError("each file once", f"{entry.filename} more than once", fix)


def _check_entry(entry: zipfile.ZipInfo, bounds: Bounds) -> None:
    name, path = entry.filename, PurePosixPath(entry.filename)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
    if unsafe or not path.parts or ":" in path.parts[0]:
        fix = "zip from inside the folder: zip ../submission.zip model.py model.safetensors"
        found = f"{name!r}, which {'leaves it' if path.parts else 'names no file'}"
        raise RefusedError("paths inside the folder", found, fix)
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        what = "a link" if kind == stat.S_IFLNK else "a special file"
        raise RefusedError("plain files", f"{name}, {what}", "pack the file itself")
    if entry.flag_bits & 1:
        fix = "zip it without a password"
        raise RefusedError("a zip without encryption", f"{name} encrypted", fix)
    if entry.file_size > ROUTINE and entry.file_size > bounds.ratio * max(entry.compress_size, 1):
        ratio = entry.file_size / max(entry.compress_size, 1)
        found = f"{name} shrunk {ratio:,.0f} times (a zip bomb?)"
        raise RefusedError(f"at most {bounds.ratio:g} times", found, "pack real weights")


def _write(content: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, left: int) -> int:
    """Write one entry, counting the bytes that it really unpacks to; returns their number."""
    target = folder.joinpath(*PurePosixPath(entry.filename).parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with content.open(entry) as packed, target.open("xb") as file:
        while chunk := packed.read(1 << 20):
            written += len(chunk)
            if written > left:
                found = f"{entry.filename} larger"
                raise RefusedError("the size that it declares", found, "zip again")
            file.write(chunk)
    return written
