"""Packages run as their platform runs them: offline, few packages, predict.py's rows."""

import ast
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from robust_submission.checker.sandbox import link_packages, namespaces
from robust_submission.cli.errors import UserError
from robust_submission.models.load import load_checkpoint
from robust_submission.packaging import platforms
from robust_submission.packaging.platforms import (
    Platform,
    check_place,
    platform_files,
    write_platform,
)
from robust_submission.prediction.layout import plan_layout
from robust_submission.prediction.schema import Answers, Format, Layout
from robust_submission.prediction.template import read_template
from tests.conftest import run_command
from tests.packaging.test_export import build

NAMES = [str(digit) for digit in range(10)]
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier behind GCM."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build(randomize={"min_size": 27}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many kinds, and what is none."""
    folder = tmp_path_factory.mktemp("data")
    grey = np.tile(np.arange(0, 65536, 2048, dtype=np.uint16), (32, 1))
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{number + 6}.png")
    large = Image.fromarray(PIXELS[0]).resize((90, 50))
    turned = Image.Exif()
    turned[274] = 6
    large.save(folder / "10.jpg", exif=turned)
    # Whose artist is a number, which nothing writes again as a text.
    odd = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 274, 3, 1, 6)
    odd += struct.pack("<HHII", 315, 5, 1, 38) + bytes(4) + struct.pack("<II", 1, 2)
    large.save(folder / "11.jpg", exif=b"Exif\0\0" + odd)
    large.convert("CMYK").save(folder / "2.JPEG")
    large.convert("L").save(folder / "a b.png")
    large.quantize(8).save(folder / "palette.gif")
    alpha = Image.fromarray(np.dstack([PIXELS[1], PIXELS[2][..., 0]]))
    alpha.save(folder / "alpha.png")
    Image.fromarray(grey).save(folder / "sixteen.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "._10.jpg").write_bytes(b"litter")
    return folder


def layout_of(format: Format, **answers: object) -> Layout:
    return plan_layout(format, ["0.png"], NAMES, None, Answers(**answers))  # type: ignore[arg-type]


def run_program(command: list[str], program: Path, root: Path) -> None:
    """With torch, numpy and Pillow, and without a network where Linux allows it."""
    link_packages(root / "packages", ["torch", "numpy", "pillow"])
    python, *words = command
    assert python in ("python", "python3")
    environment = {
        "PYTHONPATH": f"{root / 'packages'}:/tmp/packages",
        "PATH": "/usr/bin:/bin:/usr/sbin",
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-S", "-B", *words]
    if program == Path("/tmp/model"):
        script = f'mount --bind {root} /tmp && cd {program} && exec "$@"'
        words, program = ["unshare", "--mount", "sh", "-c", script, "sh", *words], root
    done = subprocess.run(
        [*namespaces(), *words], cwd=program, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stderr and "notes.txt\n" in done.stderr


def predicted(checkpoint: Path, images: Path, out: Path, *options: object) -> pd.DataFrame:
    done = run_command(
        "inference/predict.py",
        "--checkpoint",
        checkpoint,
        "--images",
        images,
        "--out",
        out,
        *options,
    )
    assert done.returncode == 0, done.stderr
    return pd.read_csv(out)


def test_a_template_whose_ids_the_program_cannot_know_is_refused(tmp_path: Path):
    for ids, refused in ((["a/b/1.png", "a/2.png"], True), (["a/1.png", "2.png"], False)):
        (tmp_path / "sample.csv").write_text("image_id,label\n" + "".join(f"{e},0\n" for e in ids))
        template = read_template(tmp_path / "sample.csv", "csv")
        layout = plan_layout("csv", ids, NAMES, template, Answers())
        with pytest.raises(UserError, match="all of them in a/") if refused else nullcontext():
            platform_files(build(), "codabench", layout)


def test_codabench_unpacks_it_and_runs_its_command(checkpoint: Path, images: Path, tmp_path: Path):
    out, app = tmp_path / "submission.zip", tmp_path / "app"
    (tmp_path / "sample.csv").write_text("id,pred\n1,0.5\n2,0.5\n")
    template, answers = read_template(tmp_path / "sample.csv", "csv"), Answers(score_class="7")
    layout = plan_layout("csv", ["1", "2"], NAMES, template, answers)
    words = write_platform(load_checkpoint(checkpoint), "codabench", out, layout, PIXELS, 600)
    assert words.startswith(f"{out}: ") and "the checkpoint's rows of 6" in words
    with ZipFile(out) as archive:
        assert not [name for name in archive.namelist() if "/" in name]  # it would move them
        archive.extractall(app / "program")
    shutil.copytree(images, app / "input_data" / "images")
    (app / "output").mkdir()
    (tmp_path / "packages").mkdir()
    command = yaml.safe_load((app / "program" / "metadata").read_text())["command"]
    assert command.count("/app/") == 2
    run_program(command.replace("/app", str(app)).split(" "), app / "program", tmp_path)
    assert [path.name for path in (app / "output").iterdir()] == ["submission.csv"]
    found = pd.read_csv(app / "output" / "submission.csv")
    options = ("--format", "score", "--score_class", 7)
    expected = predicted(checkpoint, images, tmp_path / "sub.csv", *options)
    assert list(found.columns) == ["id", "pred"] and len(found) == 13
    assert found["id"].tolist() == [Path(name).stem for name in expected["image_name"]]
    np.testing.assert_allclose(found["pred"], expected["score"], rtol=0, atol=2e-6)
    assert expected["score"].std() > 1e-3


def test_a_hugging_face_competition_clones_it_and_runs_its_script(
    checkpoint: Path, images: Path, tmp_path: Path
):
    """In /tmp/model, with the images in /tmp/data, where a mount of one's own is allowed."""
    layout, model = layout_of("csv"), load_checkpoint(checkpoint)
    write_platform(model, "huggingface", tmp_path / "repository", layout, PIXELS, 600)
    place = tmp_path / "tmp"
    shutil.copytree(tmp_path / "repository", place / "model")
    shutil.copytree(images, place / "data")
    command = ["python", "script.py"]
    (place / "packages").mkdir()
    if namespaces():
        run_program(command, Path("/tmp/model"), place)
    else:
        run_program([*command, str(place / "data"), "."], place / "model", place)
    expected = predicted(checkpoint, images, tmp_path / "sub.csv")
    assert expected["label"].nunique() > 1 and len(expected) == 13
    assert (place / "model/submission.csv").read_bytes() == (tmp_path / "sub.csv").read_bytes()


@pytest.mark.parametrize(
    ("text", "changed", "found"),
    [
        ("import csv\n", "import time\ntime.sleep(99)\n", "expected its program to end within 1 s"),
        ("pixels[..., ::-1].copy()", "pixels", "expected the checkpoint's rows from its program"),
        (
            "import torch\n",
            "import torch, timm\n",
            "expected its program to run, found: ModuleNotFoundError",
        ),
    ],
)
def test_a_program_that_differs_is_not_written(
    text: str, changed: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = platforms.PROGRAM.read_text()
    assert text in program
    (tmp_path / "predict.py").write_text(program.replace(text, changed))
    monkeypatch.setattr(platforms, "PROGRAM", tmp_path / "predict.py")
    layout = layout_of("csv", probabilities=True)
    seconds = 1 if "sleep" in changed else 600
    with pytest.raises(UserError, match=f"a.zip: not written: {found}"):
        write_platform(build(), "codabench", tmp_path / "a.zip", layout, PIXELS, seconds)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize(
    ("out", "platform", "message"),
    [
        ("a.tar", "codabench", "expected the ending .zip for Codabench, found .tar"),
        (".", "huggingface", "expected nothing there yet"),
    ],
)
def test_where_it_goes_is_checked(tmp_path: Path, out: str, platform: Platform, message: str):
    with pytest.raises(UserError, match=message):
        check_place(tmp_path / out, platform)


def test_the_program_is_of_python_3_9():
    tree = ast.parse(platforms.PROGRAM.read_text(), feature_version=(3, 9))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.BitOr)]  # X | Y
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "strict"]
