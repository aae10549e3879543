"""predict.py: the same bytes whatever the batch, workers and processes; every mistake is named."""

import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from robust_submission.data.sources import open_source
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from tests.conftest import ROOT, run_command

COUNT = 260  # two whole micro-batches and a part of a third
SCRIPT = "inference/predict.py"


def predict(out: Path, checkpoint: Path, *arguments: object, **options: int) -> bytes:
    """What predict.py writes."""
    words = ("--out", out, "--checkpoint", checkpoint, *arguments)
    done = run_command(SCRIPT, *words, cwd=out.parent, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{out}: ") == 1
    return out.read_bytes()


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert message in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """260 digits as PNG files 1.png … 260.png."""
    folder = tmp_path_factory.mktemp("images")
    source = open_source("digits", split="test")
    for index in range(COUNT):
        Image.fromarray(source.image(index)).save(folder / f"{index + 1}.png")
    return folder


@pytest.fixture
def damaged(images: Path, tmp_path: Path) -> Path:
    """Four good images, and a truncated, an empty and a foreign file."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for number in (1, 2, 4, 8):
        (folder / f"{number}.png").write_bytes((images / f"{number}.png").read_bytes())
    (folder / "3.png").write_bytes((images / "3.png").read_bytes()[:90])
    (folder / "5.png").write_bytes(b"")
    (folder / "6.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def reference(small_run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("reference") / "sub.csv"
    return predict(out, small_run, "--images", images, "--probabilities")


def test_writes_one_row_per_image_in_natural_order(reference: bytes):
    table = pd.read_csv(BytesIO(reference))
    assert list(table["image_id"]) == [f"{number}.png" for number in range(1, COUNT + 1)]
    shares = table.filter(like="p_").to_numpy()
    assert (shares.argmax(1) == table["label"]).all() and np.allclose(shares.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "processes"), [((1, 0), 1), ((7, 4), 1), ((64, 4), 1), ((64, 0), 2)]
)
def test_batch_size_workers_and_processes_leave_the_bytes_alone(
    small_run: Path, images: Path, reference: bytes, tmp_path: Path, sizes: tuple, processes: int
):
    batch_size, num_workers = sizes
    arguments = ("--images", images, "--batch_size", batch_size, "--num_workers", num_workers)
    arguments += ("--probabilities",)
    assert predict(tmp_path / "sub.csv", small_run, *arguments, processes=processes) == reference


def test_predicts_the_test_images_of_the_run_itself(small_run: Path, tmp_path: Path):
    table = pd.read_csv(BytesIO(predict(tmp_path / "sub.csv", small_run)))
    assert len(table) == 360 and list(table.columns) == ["image_id", "label"]
    summary = pd.read_json(small_run / "summary.json", typ="series")
    labels = open_source("digits", split="test").labels
    assert np.mean(table["label"].to_numpy() == labels) == pytest.approx(summary["test_accuracy"])


def test_limit_predicts_the_first(small_run: Path, images: Path, tmp_path: Path):
    content = predict(tmp_path / "sub.json", small_run, "--images", images, "--limit", 3)
    assert list(pd.read_json(BytesIO(content))["image_id"]) == [1, 2, 3]


@pytest.mark.parametrize("limit", [None, 5])
def test_a_template_decides_rows_and_columns(
    small_run: Path, images: Path, tmp_path: Path, limit: int | None
):
    digits = [f"p_{digit}" for digit in range(10)]
    rows = "".join(f"{number},{','.join(['0.1'] * 10)}\n" for number in range(COUNT, 0, -1))
    (tmp_path / "template.csv").write_text(f"id,{','.join(digits)}\n{rows}")
    arguments = ("--images", images, "--template", tmp_path / "template.csv")
    arguments += ("--limit", limit or "null")
    table = pd.read_csv(BytesIO(predict(tmp_path / "sub.csv", small_run, *arguments)))
    assert list(table.columns) == ["id", *digits]
    assert list(table["id"]) == list(range(limit or COUNT, 0, -1))


def test_a_random_classifier_predicts_the_same_bytes(images: Path, tmp_path: Path):
    names = [str(digit) for digit in range(10)]
    options = {"backbone": "test_convnext", "image_size": 32, "randomize": {"min_size": 26}}
    RobustClassifier(class_names=names, **options).save_pretrained(tmp_path / "model")
    arguments = (tmp_path / "model", "--images", images, "--probabilities", "--batch_size")
    first, second = (predict(tmp_path / "sub.csv", *arguments, size) for size in (64, 5))
    assert first == second


def test_logits_that_are_not_finite_stop_and_nothing_is_written(
    small_run: Path, images: Path, tmp_path: Path
):
    model = load_checkpoint(small_run)
    next(model.backbone.parameters()).data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    arguments = ("--checkpoint", tmp_path / "model", "--images", images)
    done = run_command(SCRIPT, *arguments, "--out", tmp_path / "sub.csv")
    message = "model: expected finite logits, found NaN or infinity for 1.png."
    assert_refused(done, message)
    assert not (tmp_path / "sub.csv").exists()


def test_the_first_unreadable_image_stops_and_nothing_is_written(
    small_run: Path, damaged: Path, tmp_path: Path
):
    arguments = ("--checkpoint", small_run, "--images", damaged, "--out", tmp_path / "sub.csv")
    assert_refused(run_command(SCRIPT, *arguments, "--num_workers", 2), f"{damaged}/3.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_skip_bad_predicts_the_rest_and_lists_what_it_leaves_out(
    small_run: Path, damaged: Path, reference: bytes, tmp_path: Path
):
    arguments = ("--checkpoint", small_run, "--images", damaged, "--out", tmp_path / "sub.csv")
    sizes = ("--batch_size", 2, "--num_workers", 2)  # one batch has no readable image
    done = run_command(SCRIPT, *arguments, *sizes, "--skip_bad")
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped: ")]
    assert [Path(line.split(":")[1]).name for line in skipped] == ["3.png", "5.png", "6.png"]
    kept = pd.read_csv(tmp_path / "sub.csv")
    assert list(kept["image_id"]) == ["1.png", "2.png", "4.png", "8.png"]
    whole = pd.read_csv(BytesIO(reference)).set_index("image_id")["label"]
    assert list(kept["label"]) == list(whole[kept["image_id"]])


def test_bad_label_gives_every_image_a_row_and_zip_the_same_bytes(
    small_run: Path, damaged: Path, reference: bytes, tmp_path: Path
):
    arguments = ("--checkpoint", small_run, "--images", damaged, "--out", tmp_path / "sub.csv")
    zips = list[bytes]()
    for label in ("7", "frequent", "frequent"):
        done = run_command(SCRIPT, *arguments, "--bad_label", label, "--zip")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(f"labelled {label}: ") == 2
        assert "truncated, read as far as it goes: 3.png" in done.stderr
        kept = pd.read_csv(tmp_path / "sub.csv").set_index("image_id")["label"]
        assert list(kept.index) == [f"{number}.png" for number in (1, 2, 3, 4, 5, 6, 8)]
        whole = pd.read_csv(BytesIO(reference)).set_index("image_id")["label"]
        sound = ["1.png", "2.png", "4.png", "8.png"]
        assert list(kept[sound]) == list(whole[sound])
        wanted = 7 if label == "7" else kept.drop(["5.png", "6.png"]).mode()[0]
        assert list(kept[["5.png", "6.png"]]) == [wanted] * 2
        with ZipFile(tmp_path / "sub.zip") as archive:
            assert archive.namelist() == ["sub.csv"]
            assert archive.read("sub.csv") == (tmp_path / "sub.csv").read_bytes()
        zips.append((tmp_path / "sub.zip").read_bytes())
    assert zips[1] == zips[2]
    done = run_command(SCRIPT, *arguments, "--bad_label", "cat")
    assert_refused(done, "--bad_label: expected one of the classes (0, 1, 2")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("checkpoint", "none", "none: expected the folder of a checkpoint, found none"),
        ("images", "empty", "empty: expected"),
        ("images", "none", "none: expected"),
        ("images", "unreadable", "unreadable: expected a readable image, found none."),
        ("out", "none/sub.csv", "expected the existing folder"),
        ("out", "sub.txt", "expected the ending .csv or .json"),
        ("out", "sub.zip", "--out: expected another ending beside --zip"),
        ("template", "none.csv", "none.csv: expected a file, found nothing there"),
        ("template", "unknown.csv", "line 2: expected the name of one of the 260 images"),
        ("template", "double.csv", "line 3"),
        ("template", "missing.csv", "found none for '2.png' and 258 more"),
    ],
)
def test_bad_input_is_named(
    small_run: Path, images: Path, tmp_path: Path, option: str, value: str, message: str
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable/1.png").touch()
    rows = {"unknown": "x.png,0", "double": "1.png,0\n1.png,0", "missing": "1.png,0"}
    for name, text in rows.items():
        (tmp_path / f"{name}.csv").write_text(f"image_id,label\n{text}\n")
    before = sorted(tmp_path.iterdir())
    options = {"checkpoint": small_run, "images": images, "out": tmp_path / "sub.csv"}
    options[option] = tmp_path / value
    words = [word for name, path in options.items() for word in (f"--{name}", path)]
    assert_refused(run_command(SCRIPT, *words, "--skip_bad", "--zip"), message)
    assert sorted(tmp_path.iterdir()) == before


def test_the_runs_own_data_is_not_overwritten(small_run: Path, tmp_path: Path):
    run, listed = shutil.copytree(small_run, tmp_path / "run"), tmp_path / "list.csv"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= {"name": "csv", "root": str(listed)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    listed.write_text("image_id,label\na.png,0\n")
    for out in (listed, run / "data.json"):
        done = run_command(SCRIPT, "--checkpoint", run, "--out", out)
        assert_refused(done, f"{out}: expected an output that is no input")


def test_a_write_that_fails_leaves_the_former_file(small_run: Path, images: Path, tmp_path: Path):
    out = tmp_path / "sub.csv"
    out.write_text("former")
    options = ("--out", out, "--checkpoint", small_run, "--images", images, "--probabilities")
    done = run_command("tests/small_files.py", 1000, ROOT / SCRIPT, *options)
    assert_refused(done, f"error: {out}: not written: File too large")
    assert out.read_text() == "former" and [path.name for path in tmp_path.iterdir()] == ["sub.csv"]
