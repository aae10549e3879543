"""predict.py: the same bytes whatever the batch, workers and processes; every mistake is named."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from inference.predict import Options, predict
from tests.conftest import ROOT, run_command

COUNT = 260  # two whole micro-batches and a part of a third


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """260 digits as PNG files 1.png … 260.png."""
    from robust_submission.data.sources import open_source

    folder = tmp_path_factory.mktemp("images")
    source = open_source("digits", split="test")
    for index in range(COUNT):
        Image.fromarray(source.image(index)).save(folder / f"{index + 1}.png")
    return folder


@pytest.fixture(scope="module")
def reference(small_run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("reference") / "sub.csv"
    predict(Options(out=out, checkpoint=small_run, images=images, probabilities=True))
    return out.read_bytes()


def test_writes_one_row_an_image_in_natural_order(reference: bytes):
    table = pd.read_csv(io.BytesIO(reference))
    assert list(table["image_id"]) == [f"{number}.png" for number in range(1, COUNT + 1)]
    shares = table.filter(like="p_").to_numpy()
    assert (shares.argmax(1) == table["label"]).all() and np.allclose(shares.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (7, 4), (64, 4), (64, 0)])
def test_batch_size_and_workers_leave_the_bytes_alone(
    small_run: Path,
    images: Path,
    reference: bytes,
    tmp_path: Path,
    batch_size: int,
    num_workers: int,
):
    out = tmp_path / "sub.csv"
    sizes = {"batch_size": batch_size, "num_workers": num_workers}
    predict(Options(out=out, checkpoint=small_run, images=images, probabilities=True, **sizes))
    assert out.read_bytes() == reference


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_leave_the_bytes_alone(
    small_run: Path, images: Path, reference: bytes, tmp_path: Path, processes: int
):
    arguments = ("--checkpoint", small_run, "--images", images, "--out", tmp_path / "sub.csv")
    script = "inference/predict.py"
    done = run_command(script, *arguments, "--probabilities", processes=processes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sub.csv").read_bytes() == reference
    assert done.stdout.count("260 rows") == 1


def test_predicts_the_test_images_of_the_run_itself(small_run: Path, tmp_path: Path):
    out = tmp_path / "sub.csv"
    predict(Options(out=out, checkpoint=small_run))
    table = pd.read_csv(out)
    assert len(table) == 360 and list(table.columns) == ["image_id", "label"]
    summary = pd.read_json(small_run / "summary.json", typ="series")
    from robust_submission.data.sources import open_source

    labels = open_source("digits", split="test").labels
    assert (table["label"] == labels).mean() == pytest.approx(summary["test_accuracy"])


def test_limit_takes_the_first(small_run: Path, images: Path, tmp_path: Path):
    out = tmp_path / "sub.json"
    predict(Options(out=out, checkpoint=small_run, images=images, limit=3))
    assert list(pd.read_json(out)["image_id"]) == [1, 2, 3]


def test_a_template_decides_rows_columns_and_label_names(
    small_run: Path, images: Path, tmp_path: Path
):
    digits = [f"p_{digit}" for digit in range(10)]
    rows = "".join(f"{number},{','.join(['0.1'] * 10)}\n" for number in range(COUNT, 0, -1))
    (tmp_path / "template.csv").write_text(f"id,{','.join(digits)}\n{rows}")
    common = {"checkpoint": small_run, "images": images, "template": tmp_path / "template.csv"}
    for limit in (None, 5):
        predict(Options(out=tmp_path / "sub.csv", limit=limit, **common))
        table = pd.read_csv(tmp_path / "sub.csv")
        assert list(table.columns) == ["id", *digits]
        assert list(table["id"]) == list(range(limit or COUNT, 0, -1))


def test_logits_that_are_not_finite_stop_and_nothing_is_written(
    small_run: Path, images: Path, tmp_path: Path
):
    from robust_submission.models.load import load_checkpoint

    model = load_checkpoint(small_run)
    next(model.backbone.parameters()).data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: expected finite logits, .* for 1\.png"):
        predict(Options(out=tmp_path / "sub.csv", checkpoint=tmp_path / "model", images=images))
    assert not (tmp_path / "sub.csv").exists()


def test_a_run_without_a_readable_image_is_named(
    small_run: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from robust_submission.data.sources import open_source

    (damaged / "0.png").write_bytes(b"")
    monkeypatch.setattr(
        "inference.predict.open_run_data", lambda *_: open_source("images", damaged)
    )
    options = Options(out=tmp_path / "sub.csv", checkpoint=small_run, skip_bad=True, limit=1)
    with pytest.raises(ValueError, match=f"{small_run}: expected a readable image"):
        predict(options)


def test_a_random_classifier_predicts_the_same_bytes(images: Path, tmp_path: Path):
    from robust_submission.models.classifier import RobustClassifier

    names = [str(digit) for digit in range(10)]
    options = {"backbone": "test_convnext", "image_size": 32, "randomize": {"min_size": 26}}
    RobustClassifier(class_names=names, **options).save_pretrained(tmp_path / "model")
    files = list[bytes]()
    for batch_size in (64, 5):
        common = {"checkpoint": tmp_path / "model", "images": images, "probabilities": True}
        predict(Options(out=tmp_path / "sub.csv", batch_size=batch_size, **common))
        files.append((tmp_path / "sub.csv").read_bytes())
    assert files[0] == files[1]


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


def test_the_first_unreadable_image_stops_and_nothing_is_written(
    small_run: Path, damaged: Path, tmp_path: Path
):
    arguments = ("--checkpoint", small_run, "--images", damaged, "--out", tmp_path / "sub.csv")
    done = run_command("inference/predict.py", *arguments, "--num_workers", 2)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(damaged / "3.png") in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_skip_bad_predicts_the_rest_and_lists_what_it_left_out(
    small_run: Path,
    images: Path,
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    files = list[bytes]()
    for batch_size, num_workers in ((64, 0), (2, 2)):
        sizes = {"batch_size": batch_size, "num_workers": num_workers}
        common = {"checkpoint": small_run, "out": tmp_path / "sub.csv"}
        predict(Options(images=damaged, skip_bad=True, **common, **sizes))
        files.append((tmp_path / "sub.csv").read_bytes())
        skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
        assert [Path(line.split(":")[1].strip()).name for line in skipped] == [
            "3.png",
            "5.png",
            "6.png",
        ]
    assert files[0] == files[1]
    kept = pd.read_csv(tmp_path / "sub.csv")
    predict(Options(images=images, checkpoint=small_run, out=tmp_path / "all.csv"))
    whole = pd.read_csv(tmp_path / "all.csv").set_index("image_id")["label"]
    assert list(kept["label"]) == list(whole[kept["image_id"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "none"}, "none: expected the folder of a checkpoint, found none"),
        ({"images": "empty"}, "empty: expected"),
        ({"images": "none"}, "none: expected"),
        ({"out": "none/sub.csv"}, "expected the existing folder"),
        ({"out": "sub.txt"}, "expected the ending .csv or .json"),
        ({"template": "unknown.csv"}, "line 2: expected the name of one of the 260 images"),
        ({"template": "double.csv"}, "line 3"),
        ({"template": "missing.csv"}, "missing '2.png' and 258 more"),
    ],
)
def test_bad_input_is_named_before_anything_is_predicted(
    small_run: Path, images: Path, tmp_path: Path, options: dict[str, str], message: str
):
    (tmp_path / "empty").mkdir()
    for name, rows in [
        ("unknown", "x.png,0"),
        ("double", "1.png,0\n1.png,0"),
        ("missing", "1.png,0"),
    ]:
        (tmp_path / f"{name}.csv").write_text(f"image_id,label\n{rows}\n")
    before = sorted(tmp_path.iterdir())
    given = {name: tmp_path / value for name, value in options.items()}
    common = {"checkpoint": small_run, "images": images, "out": tmp_path / "sub.csv"}
    with pytest.raises(ValueError, match=message):
        predict(Options(**(common | given)))
    assert sorted(tmp_path.iterdir()) == before


def test_a_write_that_fails_leaves_the_former_file(small_run: Path, images: Path, tmp_path: Path):
    out = tmp_path / "sub.csv"
    out.write_text("former")
    options = ("--out", out, "--checkpoint", small_run, "--images", images, "--probabilities")
    done = run_command("tests/small_files.py", 1000, ROOT / "inference/predict.py", *options)
    assert done.returncode == 1 and f"error: {out}: not written: File too large" in done.stderr
    assert out.read_text() == "former" and [path.name for path in tmp_path.iterdir()] == ["sub.csv"]
