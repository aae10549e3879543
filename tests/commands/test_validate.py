"""validate.py: one line for a sound file, every fault of another, and what its options refuse."""

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import run_command


def test_accepts_and_refuses(tmp_path: Path):
    sub, images = tmp_path / "sub.csv", tmp_path / "images"
    images.mkdir()
    for name in ("2.png", "10.png"):
        Image.new("RGB", (2, 2)).save(images / name)
    sub.write_text("image_id,label\n10.png,0\n2.png,1\n")
    done = run_command("submission/validate.py", sub, "--images", images)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{sub}: 2 rows, valid\n", "")
    sub.write_text("image_id,label\n10.png,0\n\n10.png,-1\n")
    done = run_command("submission/validate.py", sub, "--images", images)
    assert (done.returncode, done.stdout) == (1, "")
    first, *lines = done.stderr.splitlines()
    assert first == f"error: {sub}: 2 rows, 4 faults"
    assert [line.split(":")[0] for line in lines] == [
        "line 3",
        "line 4",
        "line 4",
        "the whole file",
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "file"),
        (["--imges", "x", "sub.csv"], 2, "unknown option --imges; nearest known: images"),
        (["sub.csv", "--format", "xml"], 2, "xml"),
        (["sub.csv", "--num_classes", "many"], 2, "many"),
        (["a.csv", "b.csv"], 2, "b.csv"),
        (
            ["no.csv"],
            1,
            "error: no.csv: expected a file, found nothing there.",
        ),
        (["sub.txt"], 1, "sub.txt: expected the ending .csv or .json, or --format, found .txt."),
        (["sub.csv", "--template", "no.csv"], 1, "error: no.csv: expected a file"),
        (
            ["s.csv", "--num_classes", "2", "--class_names", "a"],
            1,
            "--num_classes: expected 1, the",
        ),
        (["s.csv", "--num_classes", "0"], 1, "--num_classes: expected at least 1, found 0."),
    ],
)
def test_usage(tmp_path: Path, arguments: list[str], status: int, message: str):
    done = run_command("submission/validate.py", *arguments, cwd=tmp_path)
    assert done.returncode == status and message in done.stderr
    assert "Traceback" not in done.stderr
