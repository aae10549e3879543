"""Files and folders appear whole or not at all."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from robust_submission.cli.errors import UserError
from robust_submission.cli.files import (
    atomic_write,
    check_writable,
    clear_folder,
    holds_lock,
    lock_folder,
    scratch_folder,
    temporary_beside,
    whole_folder,
)


def test_the_file_is_there_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("former")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("whole")
        assert path.read_text() == "former"
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_links_are_left_alone(tmp_path: Path) -> None:
    """A writer is killed, another is at work, and a stranger has put a link there."""
    path, users = tmp_path / "out.txt", tmp_path / "users"
    users.mkdir()
    (users / "file").write_text("mine")
    for number, target in enumerate((users, users / "file")):
        (tmp_path / f".out.txt.{number:016x}.tmp").symlink_to(target)
    (tmp_path / ".out.txt.mine.tmp").write_text("mine")
    before = set(tmp_path.iterdir())
    if (pid := os.fork()) == 0:
        with temporary_beside(path), temporary_beside(path, folder=True) as folder:
            (folder / "file").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len([*tmp_path.iterdir()]) == len(before) + 2
    with temporary_beside(path) as mine, atomic_write(path) as other:
        assert {*tmp_path.iterdir()} == before | {mine, other}
        other.write_text("new")
    assert {*tmp_path.iterdir()} == before | {path} and path.read_text() == "new"
    assert (users / "file").read_text() == "mine"


def test_an_output_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("config.json", "images/0.png", "images/label.txt", "images/sub.csv"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "link.csv").symlink_to(tmp_path / "config.json")
    read = (tmp_path / "config.json", None, tmp_path / "images", tmp_path / "none")
    for name in ("config.json", "link.csv", "images/0.png", "images/label.txt"):
        with pytest.raises(UserError, match=f"{name}: expected an output that is no input, found"):
            check_writable(tmp_path / name, *read)
    for name in ("images/sub.csv", "images/new.png", "sub.csv"):
        check_writable(tmp_path / name, *read)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_former_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out.txt"
    path.write_text("former")
    with pytest.raises(error, match="stop"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error("stop")
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with (
        pytest.raises(UserError, match=r"out\.txt: not written: No space left on device\."),
        atomic_write(path) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, os.strerror(28))
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_for_temporary_files_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(UserError, match=f"^{tmp_path}: expected space .*, found: No space left on"),
        scratch_folder("a-") as folder,
    ):
        assert folder.parent == tmp_path
        raise OSError(28, os.strerror(28))
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "out.txt", tmp_path / "elsewhere" / "real.txt"
    link.symlink_to(target)
    for content in ("new", "replaced"):
        with atomic_write(link) as temporary:
            temporary.write_text(content)
        assert link.readlink() == target and target.read_text() == content
    assert list(target.parent.iterdir()) == [target]
    target.unlink()
    target.parent.rmdir()
    with pytest.raises(UserError, match=r"expected the existing folder .*elsewhere"):
        check_writable(link)


def test_a_pipe_is_no_output(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "out.txt")
    for path in (pipe, Path(os.devnull)):
        with pytest.raises(UserError, match="expected a file name, found a device or a pipe"):
            check_writable(path)


def test_check_writable(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "out.txt") == tmp_path / "out.txt"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path / "no" / "out.txt", "expected the existing folder .*no, found nothing there"),
        (tmp_path / "file" / "out.txt", "expected the existing folder .*file, found a file"),
        (tmp_path, "expected a file name, found a folder"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            check_writable(path)
        assert str(raised.value).startswith(f"{path}: ")


def test_check_writable_makes_a_file_there(tmp_path: Path, monkeypatch) -> None:
    for name in ("a" * 250, "a" * 300):  # the first is too long for its temporary name alone
        with pytest.raises(UserError, match="expected to write there, found: File name too long"):
            check_writable(tmp_path / name)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"out\.txt: expected to write there, found: Read-only"):
        check_writable(tmp_path / "out.txt")


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path: Path) -> None:
    code = "from robust_submission.cli.files import *; import sys; lock_folder(Path(sys.argv[1]))"
    other = [sys.executable, "-c", code]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    with lock_folder(tmp_path):
        clear_folder(tmp_path)
        done = subprocess.run([*other, tmp_path], capture_output=True, text=True)
    assert f"{tmp_path}: expected no other process at work there, found one." in done.stderr
    assert subprocess.run([*other, tmp_path]).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_is_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    (tmp_path / "users").write_text("mine")
    lock = tmp_path / ".lock"
    os.mkfifo(lock) if kind == "pipe" else lock.symlink_to(tmp_path / "users")
    found = "a device or a pipe" if kind == "pipe" else ".*a symbolic link"
    with pytest.raises(UserError, match=rf"\.lock: expected a file to lock, found:? ?{found}"):
        lock_folder(tmp_path)
    assert (tmp_path / "users").read_text() == "mine"
    lock.unlink()
    lock.write_text("kept")
    with lock_folder(tmp_path) as held:
        assert lock.read_text() == "kept" and holds_lock(held, tmp_path)
        lock.unlink()
        lock.write_text("another")
        assert not holds_lock(held, tmp_path)


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    with lock_folder(tmp_path) as one, lock_folder(tmp_path) as other:
        assert not one.closed and not other.closed


def test_a_folder_is_there_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with whole_folder(path) as temporary:
        (temporary / "file").write_text("whole")
        assert temporary.parent == tmp_path and not path.exists()
    assert (path / "file").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_no_folder_and_what_stands_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for error, raised in ((KeyError("stop"), KeyError), (OSError(28, "full"), ValueError)):
        with pytest.raises(raised), whole_folder(path) as temporary:
            (temporary / "file").write_text("half")
            raise error
        assert list(tmp_path.iterdir()) == []
    path.mkdir()
    with pytest.raises(UserError, match="nothing there yet, found a folder"), whole_folder(path):
        raise AssertionError
    with pytest.raises(UserError, match="expected the existing folder"):
        whole_folder(tmp_path / "no" / "out").__enter__()
    assert list(tmp_path.iterdir()) == [path]
