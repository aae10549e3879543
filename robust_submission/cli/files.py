"""Outputs that are there whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from robust_submission.cli.errors import UserError

_LOCK = ".lock"


def _behind_link(path: Path) -> Path:
    """Where a symbolic link leads; any other path as it is."""
    return path.resolve() if path.is_symlink() else path


def _beside(path: Path) -> Path:
    """The temporary name of `path`, this process's own."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_writable(path: Path) -> Path:
    """Fail before hours of work when `path` cannot be written at their end.

    Makes and removes a file beside it.

    Raises:
        UserError: the folder of `path` does not exist or is not a folder, something other than a
            file stands at `path`, or no file can be made there.
    """
    try:
        target = _behind_link(path)
        if not target.parent.is_dir():
            found = "a file" if target.parent.exists() else "nothing there"
            raise UserError(f"{path}: expected the existing folder {target.parent}, found {found}.")
        if path.exists() and not path.is_file():
            found = "a folder" if path.is_dir() else "a device or a pipe"
            raise UserError(f"{path}: expected a file name, found {found}.")
        _beside(target).touch()
        _beside(target).unlink(missing_ok=True)  # another machine's process may have this number
    except OSError as error:
        raise UserError(f"{path}: expected to write there, found: {error.strerror}.") from error
    return path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to `path` when the block ends without an error.

    On any error the temporary file is removed and `path` keeps its former content. A symbolic link
    stays one: the file that it leads to is replaced.
    """
    target = _behind_link(check_writable(path))
    temporary = _beside(target)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def lock_folder(folder: Path) -> TextIO:
    """Keep other processes from working in a folder, until the file is closed or this process ends.

    Holds `.lock` in it, which stays. Where the file system knows no locks nothing is kept.

    Raises:
        UserError: another process works there.
    """
    file = (folder / _LOCK).open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: expected no other process at work there, found one.") from None
    except OSError:
        pass
    return file


def clear_folder(folder: Path) -> None:
    """Remove all that a folder holds, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, renamed to `path` when the block ends without an error.

    On any error the new folder is removed.

    Raises:
        UserError: something stands at `path`, or the folder cannot be made or renamed there.
    """
    if path.exists():
        found = "a folder" if path.is_dir() else "a file"
        raise UserError(f"{path}: expected nothing there yet, found {found}.")
    check_writable(path)
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
