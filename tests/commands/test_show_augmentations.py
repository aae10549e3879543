"""The contact sheet as a command."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_command

SCRIPT = "data/show_augmentations.py"


def test_a_sheet_of_ones_own_image(tmp_path: Path) -> None:
    photo, sheet = tmp_path / "photo.png", tmp_path / "sheet.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(photo)
    words = ("--image", photo, "--out", sheet, "--image_size", 32, "--draws", 2)
    done = run_command(SCRIPT, *words)
    assert (done.returncode, done.stdout) == (0, f"{sheet}: 49 operations.\n"), done.stderr
    first = sheet.read_bytes()
    picture = Image.open(sheet)
    assert picture.format == "PNG"
    assert picture.getcolors(maxcolors=1000) is None  # it has more
    assert run_command(SCRIPT, *words, "--seed", 1).returncode == 0
    assert sheet.read_bytes() != first
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "sheet.png"}


def test_a_sheet_without_an_image(tmp_path: Path) -> None:
    done = run_command(SCRIPT, "--out", tmp_path / "sheet.png", "--image_size", 16)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ("--image", "nothing.png"),
            1,
            "error: nothing.png: expected an image file, found nothing",
        ),
        (("--image", "text.png"), 1, "error: text.png: expected an image (JPEG, "),
        (("--draws", 0), 1, "error: --draws: expected at least 1, received 0."),
        (("--out", "no/sheet.png"), 1, "error: no/sheet.png: expected the existing folder no"),
        (("--size", 3), 2, "error: unknown option --size"),
    ],
)
def test_errors(tmp_path: Path, words: tuple[object, ...], status: int, message: str) -> None:
    (tmp_path / "text.png").write_text("no image")
    done = run_command(SCRIPT, "--out", "sheet.png", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(message) and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == status
    assert not (tmp_path / "sheet.png").exists()
