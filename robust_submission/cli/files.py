"""Output files and folders that appear whole or not at all, and a lock for a folder."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from robust_submission.cli.errors import UserError

_LOCK = ".lock"
_EPOCH = (1980, 1, 1, 0, 0, 0)
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What an OSError of a full disk says."""


def _behind_link(path: Path) -> Path:
    """The target of a symbolic link; any other path unchanged."""
    return path.resolve() if path.is_symlink() else path


@contextmanager
def temporary_beside(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new file or folder beside `path`, removed at the end of the block if still there.

    Its name is random, so that nobody can have put a link there. It is locked while its process
    lives; what a killed process left of the same `path` is removed first.
    """
    clear_left(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    if folder:
        temporary.mkdir()
    flags = os.O_RDONLY if folder else os.O_CREAT | os.O_EXCL
    held = os.open(temporary, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
    finally:
        os.close(held)
        _remove(temporary)


def clear_left(path: Path) -> None:
    """Remove what killed processes left of `temporary_beside(path)`."""
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    for each in filter(lambda found: left.fullmatch(found.name), path.parent.iterdir()):
        with suppress(OSError):  # its process lives, or it is another user's
            held = os.open(each, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(each)
            finally:
                os.close(held)


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def checkpoint_files(*folders: Path | None) -> list[Path]:
    """What is read of these run folders, or checkpoints: an output may not replace it."""
    names = ("config.json", "model.safetensors", "recipe.yaml", "metrics.csv", "provenance.json")
    return [folder / name for folder in filter(None, folders) for name in (*names, "data.json")]


def check_writable(path: Path, *inputs: Path | None) -> Path:
    """Check that `path` can be written, before hours of work.

    Creates and removes a file beside it.

    Args:
        path: An output.
        inputs: What the command reads: files; or folders of images, in which an output may be a new
            file, or replace a .csv or .json file.

    Raises:
        UserError: The folder of `path` does not exist or is not a folder, `path` exists and is not
            a file, no file can be created there, or `path` is an input.
    """
    try:
        for each in filter(None, inputs):
            _require_other(path, each)
        target = _behind_link(path)
        if not target.parent.is_dir():
            found = "a file" if target.parent.exists() else "nothing there"
            raise UserError(f"{path}: expected the existing folder {target.parent}, found {found}.")
        if path.exists() and not path.is_file():
            found = "a folder" if path.is_dir() else "a device or a pipe"
            raise UserError(f"{path}: expected a file name, found {found}.")
        with temporary_beside(target):
            pass
    except OSError as error:
        raise UserError(f"{path}: expected to write there, found: {error.strerror}.") from error
    return path


def _require_other(path: Path, read: Path) -> None:
    """Raise UserError if writing `path` would replace what is read."""
    if not path.exists() or not read.exists():
        return
    within = path.resolve().is_relative_to(read.resolve()) and read.is_dir()
    if path.samefile(read) or (within and path.suffix.lower() not in (".csv", ".json")):
        raise UserError(f"{path}: expected an output that is no input, found the input {read}.")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to `path` if the block ends without an error.

    On an error the temporary file is removed and `path` keeps its content. If `path` is a symbolic
    link, its target is replaced.

    Raises:
        UserError: `path` cannot be written, or the disk is full.
    """
    target = _behind_link(check_writable(path))
    try:
        with temporary_beside(target) as temporary:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(target)
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror or error}.") from error


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
        UserError: Another process holds the lock, or it is no regular file (a link is not followed,
            as it may lead to a user's).
    """
    path = folder / _LOCK
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        found = "a symbolic link" if path.is_symlink() else error.strerror
        raise UserError(f"{path}: expected a file to lock, found: {found}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: expected a file to lock, found a device or a pipe.")
    file = os.fdopen(descriptor, "r+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: expected no other process at work there, found one.") from None
    except OSError:
        pass
    return file


def holds_lock(file: TextIO, folder: Path) -> bool:
    """Whether the folder is the one that was locked, and not deleted or replaced since."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), (folder / _LOCK).stat())
    except OSError:
        return False


def own_folder(folder: Path) -> Path:
    """Make a folder for files that are written and removed again, or take the one that is there.

    Raises:
        UserError: It is a link, which may lead to a user's files; or it cannot be made.
    """
    try:
        if folder.is_symlink():
            raise UserError(f"{folder}: expected a folder of its own, found a symbolic link.")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = error.strerror
        raise UserError(f"{folder}: expected a folder to write to, found: {found}.") from error
    return folder


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yield a temporary folder in TMPDIR, removed with all that a stranger's program leaves in it.

    Raises:
        UserError: The disk is full.
    """
    place = tempfile.gettempdir()
    try:
        top = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
        try:
            yield top
        finally:
            _remove_deep(top)
    except OSError as error:
        if error.errno not in FULL:
            raise
        expected = "space for temporary files (TMPDIR names another folder)"
        raise UserError(f"{place}: expected {expected}, found: {error.strerror}.") from error


def _remove_deep(top: Path) -> None:
    """Remove a folder of any depth: `shutil.rmtree` fails on a thousand folders in one another.

    Folders are brought to its top one by one.
    """
    folders = [top]
    for folder in folders:
        for path in list(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
                folders.append(path.rename(top / secrets.token_hex(16)))
            else:
                path.unlink()
    for folder in reversed(folders):
        folder.rmdir()


def clear_folder(folder: Path) -> None:
    """Remove everything in a folder except its lock."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            _remove(path)


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
    try:
        with temporary_beside(path, folder=True) as temporary:
            yield temporary
            temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror or error}.") from error
