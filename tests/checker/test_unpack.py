"""A stranger's zip: nothing leaves the folder, nothing grows beyond its bounds."""

import contextlib
import os
import stat
import zipfile
from pathlib import Path

import pytest

from robust_submission.checker.unpack import Bounds, RefusedError, needless, unpack
from robust_submission.cli.files import scratch_folder


def make_zip(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def link(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry, target.encode()


def unnamed() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("a")
    entry.filename = ""
    return entry


def test_a_sound_archive_comes_out_byte_for_byte(tmp_path: Path):
    content = {"./model.py": b"x = 1\n", "parts/weights.bin": bytes(range(256)) * 50}
    archive = make_zip(tmp_path / "a.zip", *content.items())
    (tmp_path / "out").mkdir()
    assert unpack(archive, tmp_path / "out") == ["model.py", "parts/weights.bin"]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in content} == content


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([("../evil.py", b"")], "'../evil.py', which leaves it"),
        ([("a/../../evil.py", b"")], "which leaves it"),
        ([("/tmp/evil.py", b"")], "'/tmp/evil.py', which leaves it"),
        ([("..\\evil.py", b"")], "which leaves it"),
        ([("C:evil.py", b"")], "which leaves it"),
        ([(".", b"")], "'.', which names no file"),
        ([(unnamed(), b"")], "'', which names no file"),
        ([("model.py", b""), ("./model.py", b"")], "more than once"),
        ([link("weights", "/etc/passwd")], "weights, a link"),
        ([("model.py", b""), ("MODEL.py", b"")], "more than once"),
        ([("weights", bytes(20 << 20))], "shrunk .* times \\(a zip bomb\\?\\)"),
        ([("a", b"1" * 600), ("b", b"2" * 600)], "unpacked \\(a zip bomb\\?\\)"),
        ([(str(number), b"") for number in range(60)], "60"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, entries: list[tuple[str | zipfile.ZipInfo, bytes]], found: str
):
    archive = make_zip(tmp_path / "a.zip", *entries)
    (tmp_path / "out").mkdir()
    bomb = "shrunk" in found
    with pytest.raises(RefusedError, match=found) as refusal:
        unpack(archive, tmp_path / "out", Bounds(files=50, total=1 << 30 if bomb else 1000))
    assert refusal.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out"]
    assert not list((tmp_path / "out").iterdir())


def test_damage_is_named(tmp_path: Path):
    (tmp_path / "text.zip").write_text("no zip")
    cut = make_zip(tmp_path / "cut.zip", ("model.py", b"x" * 1000))
    flipped = bytearray(cut.read_bytes())
    flipped[45] ^= 0xFF
    cut.write_bytes(bytes(flipped))
    named = make_zip(tmp_path / "named.zip", ("mé.py", b""))
    named.write_bytes(named.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("model.py", bytes(range(250)) * 20)
    flipped = bytearray((tmp_path / "lzma.zip").read_bytes())
    flipped[42] = 0xFF  # of LZMA's properties
    (tmp_path / "lzma.zip").write_bytes(bytes(flipped))
    for name in ("text.zip", "cut.zip", "named.zip", "lzma.zip"):
        (tmp_path / f"{name}.out").mkdir()
        with pytest.raises(RefusedError, match="expected a whole zip file"):
            unpack(tmp_path / name, tmp_path / f"{name}.out")


def test_a_size_that_lies_does_not_get_past(tmp_path: Path):
    """The declared size is rewritten to 10 bytes; the content is 5,000."""
    archive = make_zip(tmp_path / "a.zip", ("model.py", bytes(range(250)) * 20))
    content = archive.read_bytes().replace((5000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    archive.write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(RefusedError):
        unpack(archive, tmp_path / "out")
    written = tmp_path / "out" / "model.py"
    assert not written.exists() or written.stat().st_size <= 10


def test_a_scratch_folder_goes_whatever_is_left_in_it():
    """A thousand folders and more in one another, one without rights, links and a pipe."""
    with scratch_folder("test-") as folder:
        (folder / "a link").symlink_to(folder)
        os.mkfifo(folder / "pipe")
        (folder / "locked" / "inside").mkdir(parents=True)
        (folder / "locked").chmod(0)
        with contextlib.chdir(folder):
            for _ in range(3000):
                Path("deep").mkdir()
                os.chdir("deep")
            Path("file").touch()
    assert not folder.exists()


def test_what_systems_leave_is_needless() -> None:
    names = ["a/@eaDir/model.py", "__MACOSX/._model.py", "Thumbs.db", ".ipynb_checkpoints/a.py"]
    assert needless([*names, "model.py", "eadir/weights.bin"]) == names
