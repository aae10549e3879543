"""Checking data before a run, as a command."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_command

SCRIPT = "data/check.py"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes with 3 images in train/ and 1 in test/, of two sizes, all of other pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                shape = (8, 8 + 2 * index, 3)
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_sound_data(photos: Path) -> None:
    shutil.copy(photos / "train/cat/0.png", photos / "train/cat/copy.png")
    (photos / "notes.txt").write_text("")
    shutil.copy(photos / "train/dog/0.png", photos / "train/stray.png")
    done = run_command(SCRIPT, "--data.name", "folder", "--data.root", photos, "--num_workers", 2)
    assert done.returncode == 0, done.stderr
    rows = [cells(line) for line in done.stdout.splitlines() if "│" in line]
    assert rows == [
        ["train", "7", "8 x 8", "12 x 8", "0"],
        ["test", "2", "8 x 8", "8 x 8", "0"],
        ["0", "cat", "4", "1"],
        ["1", "dog", "3", "1"],
    ]
    tail = done.stdout[done.stdout.index("left out") :].splitlines()
    assert sorted(tail[1:3]) == [
        f"  {photos}/notes.txt: not an image",
        f"  {photos}/train/stray.png: in no class folder of a split",
    ]
    assert tail[0] == "left out: 2" and tail[3:] == [
        "same bytes: 1",
        f"  train: {photos}/train/cat/0.png = train: {photos}/train/cat/copy.png",
        "Nothing must be mended.",
    ]
    assert "train: 100%" in done.stderr


def test_what_must_be_mended(photos: Path) -> None:
    for index in (7, 8):
        (photos / f"train/dog/{index}.png").write_text("no image")
    shutil.copy(photos / "train/cat/1.png", photos / "test/cat/1.png")
    words = ("--data.name", "folder", "--data.root", photos, "--show", 1)
    done = run_command(SCRIPT, *words)
    assert done.returncode == 1
    assert f"unreadable: 2\n  {photos}/train/dog/7.png: expected an image (" in done.stdout
    assert "  and 1 more; see --show.\n" in done.stdout
    assert f"train: {photos}/train/cat/1.png = test: {photos}/test/cat/1.png\n" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        f"error: {photos}: expected data that a run can use, "
        "found unreadable images: 2; images in both train and test: 1."
    )


def test_one_class_is_too_few(photos: Path) -> None:
    path = photos / "list.csv"
    path.write_text("image,label\ntrain/cat/0.png,cat\ntrain/cat/1.png,cat\n")
    done = run_command(SCRIPT, "--data.name", "csv", "--data.root", path, "--show", 0)
    assert done.returncode == 1 and "left out: 6\n" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("can use, found classes with images: 1.")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ("--data.name", "folder", "--data.root", "no"),
            1,
            "error: no: expected a folder of class",
        ),
        (("--data.name", "shards", "--data.root", "no"), 1, "error: data.name: expected hf, which"),
        (("--data.name", "digits", "--num_workers", 0), 1, "error: num_workers: expected at least"),
        (("--data.root", "no"), 2, "error: "),
    ],
)
def test_errors(tmp_path: Path, words: tuple[object, ...], status: int, message: str) -> None:
    done = run_command(SCRIPT, *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(message) and "Traceback" not in done.stderr
