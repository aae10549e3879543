"""Output files and folders that appear whole or not at all, and a lock for a folder."""

import fcntl
import os
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from robust_submission.cli.errors import UserError

_LOCK = ".lock"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def _behind_link(path: Path) -> Path:
    """The target of a symbolic link; any other path unchanged."""
    return path.resolve() if path.is_symlink() else path


def _beside(path: Path) -> Path:
    """The temporary name of `path` in this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_writable(path: Path) -> Path:
    """Check that `path` can be written, before hours of work.

    Creates and removes a file beside it.

    Raises:
        UserError: The folder of `path` does not exist or is not a folder, `path` exists and is not
            a file, or no file can be created there.
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
    """Yield a temporary path beside `path`, renamed to `path` if the block ends without an error.

    On an error the temporary file is removed and `path` keeps its content. If `path` is a symbolic
    link, its target is replaced.

    Raises:
        UserError: `path` cannot be written, or the disk is full.
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


def write_archive(path: Path, files: Mapping[str, bytes], *, stored: Collection[str] = ()) -> None:
    """Write a zip of these files, by name; the same files give the same bytes.

    Those in `stored` are not compressed.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3  # Unix, wherever it is written
            method = zipfile.ZIP_STORED if name in stored else zipfile.ZIP_DEFLATED
            archive.writestr(entry, content, compress_type=method)


def lock_folder(folder: Path) -> TextIO:
    """Keep other processes out of a folder until the returned file is closed or the process ends.

    Locks the file `.lock` in the folder, which is left there. Without effect on file systems that
    have no locks.

    Raises:
        UserError: Another process holds the lock.
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
    """Remove everything in a folder except its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, renamed to `path` if the block ends without an error.

    On an error the new folder is removed.

    Raises:
        UserError: `path` exists, or the folder cannot be created there.
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
