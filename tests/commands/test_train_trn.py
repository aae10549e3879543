"""train_trn.py as a command, and what its TRN does for the commands that take it."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from robust_submission.models.load import load_checkpoint, load_trn
from tests.conftest import assert_same_weights, run_command, start_command

OWN_BACKBONE = """
from torch import nn
from robust_submission.models.classifier import RobustClassifier
def classifier():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    names = [str(digit) for digit in range(10)]
    return RobustClassifier(class_names=names, image_size=32, backbone=net)
"""
TINY = (
    *("--trn.width", "8", "--trn.depth", "1", "--epochs", "2", "--data.limit", "160"),
    *("--objective.attacks", "[{name: pgd, epsilon: 16/255, steps: 2}, {name: fgsm}]"),
)


def train_trn(output: Path, checkpoint: Path, *arguments: object, processes: int = 1) -> Path:
    done = run_command(
        "training/train_trn.py",
        *("--output", output, "--checkpoint", checkpoint, *TINY, *arguments),
        processes=processes,
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def small_trn(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_trn(tmp_path_factory.mktemp("trn") / "run", small_run)


def test_leaves_a_whole_run_folder(small_trn: Path):
    assert {path.name for path in small_trn.iterdir()} == {
        *("config.json", "model.safetensors", "recipe.yaml", "provenance.json", "data.json"),
        *("metrics.csv", "state", "logs", ".lock"),
    }
    assert load_trn(small_trn).stride == 2
    metrics = pd.read_csv(small_trn / "metrics.csv")
    assert list(metrics.columns) == [
        *("epoch", "train_loss", "lr", "val_loss", "val_accuracy", "val_restored_accuracy")
    ]
    assert metrics["train_loss"].is_monotonic_decreasing
    recipe = yaml.safe_load((small_trn / "recipe.yaml").read_text())
    first = {"name": "pgd", "epsilon": 16 / 255, "steps": 2, "weight": 1.0, "adaptive": False}
    assert recipe["objective"]["attacks"][0] == first


def test_killed_and_resumed_gives_the_same_weights(
    small_trn: Path, small_run: Path, tmp_path: Path
):
    output = tmp_path / "killed"
    options = ("--output", output, "--checkpoint", small_run, *TINY)
    process = start_command("training/train_trn.py", *options)
    deadline = time.monotonic() + 120
    while not (output / "state" / "epoch-0001").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    train_trn(output, small_run, "--resume")
    assert_same_weights(small_trn, output)


def test_two_processes_follow_the_loss_of_one(small_trn: Path, small_run: Path, tmp_path: Path):
    two = train_trn(tmp_path / "two", small_run, processes=2)
    one, both = (pd.read_csv(folder / "metrics.csv") for folder in (small_trn, two))
    np.testing.assert_allclose(one, both, rtol=1e-4)


def test_end_to_end_leaves_a_checkpoint_of_both(small_run: Path, tmp_path: Path):
    adaptive = "[{steps: 1, adaptive: true}]"
    options = ("--objective.end_to_end", "--ema_decay", "0.9", "--objective.attacks", adaptive)
    both = train_trn(tmp_path / "both", small_run, *options)
    measured = pd.read_csv(both / "metrics.csv").iloc[-1]
    assert 0 <= measured.val_robust_accuracy <= measured.val_accuracy
    model, before = load_checkpoint(both), load_checkpoint(small_run)
    assert model.class_names == before.class_names
    changed = model.state_dict()["backbone.head.fc.weight"]
    assert not changed.equal(before.state_dict()["backbone.head.fc.weight"])
    done = run_command("inference/predict.py", "--checkpoint", both, "--out", tmp_path / "sub.csv")
    assert done.returncode == 0, done.stderr


def test_a_surrogate_is_trained_along(small_run: Path, tmp_path: Path):
    surrogate = ("--trn.surrogate", "{widths: [8], depth: 1}", "--trn.estimator", "average")
    trn = load_trn(train_trn(tmp_path / "run", small_run, *surrogate, "--epochs", 1))
    assert trn.surrogate is not None and trn.surrogate.head.out_features == 10
    assert trn.surrogate.layers[1].outer.weight.abs().max() > 0  # pyright: ignore[reportAttributeAccessIssue]


def test_predictions_are_the_same_bytes(small_run: Path, small_trn: Path, tmp_path: Path):
    def predict(name: str, *arguments: object, processes: int = 1) -> bytes:
        options = ("--checkpoint", small_run, "--trn", small_trn, "--probabilities")
        done = run_command(
            "inference/predict.py",
            *("--out", tmp_path / name, *options, *arguments),
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
        return (tmp_path / name).read_bytes()

    expected = predict("a.csv")
    assert predict("b.csv", "--batch_size", 7, "--num_workers", 2) == expected
    assert predict("c.csv", processes=2) == expected
    plain = run_command(
        "inference/predict.py",
        *("--out", tmp_path / "d.csv", "--checkpoint", small_run, "--probabilities"),
    )
    assert plain.returncode == 0 and (tmp_path / "d.csv").read_bytes() != expected


def test_a_classifier_is_trained_behind_it(small_run: Path, small_trn: Path, tmp_path: Path):
    done = run_command(
        "training/train.py",
        *("--output", tmp_path / "run", "--trn", small_trn, "--checkpoint", small_run),
        *("--model.backbone", "test_convnext", "--data.limit", 64, "--epochs", 1),
    )
    assert done.returncode == 0, done.stderr
    trained, trn = load_checkpoint(tmp_path / "run").restore.state_dict(), load_trn(small_trn)
    assert all(trained[name].equal(each) for name, each in trn.state_dict().items())


def test_the_picture(small_run: Path, small_trn: Path, tmp_path: Path):
    command = ("inference/show_trn.py", "--checkpoint", small_run, "--out", tmp_path / "a.png")
    done = run_command(*command, "--trn", small_trn, "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    done = run_command(*command)
    assert (
        done.returncode == 1 and "expected a RobustClassifier with a TRN, or --trn" in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "NOWHERE"], "expected the folder of a checkpoint, found none"),
        (["--checkpoint", "RUN", "--objective.cache", "--data.flip"], "expected data.augmentation"),
        (
            ["--checkpoint", "RUN", "--objective.end_to_end", "--objective.cross_entropy", "0"],
            "end_to_end: expected cache false and a weight of cross_entropy or feature, found "
            "False, 0.0 and 0.0",
        ),
        (
            ["--checkpoint", "RUN", "--objective", "{cache: true, attacks: [{adaptive: true}]}"],
            "no attack that is adaptive, found one",
        ),
        (
            ["--checkpoint", "null", "--model", "NET", "--objective.end_to_end"],
            "end_to_end: expected a backbone of timm, given by its name, to save with the TRN",
        ),
        (["--checkpoint", "RUN", "--model", "a:b"], "either checkpoint or model"),
        (["--checkpoint", "RUN", "--trn.start", "NOWHERE"], "expected a safetensors file"),
        (["--checkpoint", "RUN", "--trn.surrogate", "{width: 3}"], "trn.surrogate.width: "),
        (["--checkpoint", "RUN", "--objective.attacks", "[{epsilon: -1}]"], "epsilon"),
        (["--checkpoint", "RUN", "--data.name", "folder", "--data.root", "CATS"], "in its order"),
    ],
)
def test_bad_input_is_named(small_run: Path, tmp_path: Path, arguments: list[str], message: str):
    for place in range(80):
        folder = tmp_path / "cats" / ("tabby", "siamese")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / f"{place}.png")
    (tmp_path / "net.py").write_text(OWN_BACKBONE)
    paths: dict[str, object] = {"NET": f"{tmp_path / 'net.py'}:classifier"}
    paths |= {"NOWHERE": tmp_path / "none", "RUN": small_run, "CATS": tmp_path / "cats"}
    filled = [paths.get(word, word) for word in arguments]
    done = run_command("training/train_trn.py", "--output", tmp_path / "run", *filled)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_digits_are_restored_for_who_does_not_look(tmp_path: Path):
    """From next to nothing to next to the clean accuracy, with attacks not trained on; and back to
    next to nothing under an attacker who differentiates through the gradient map."""
    learn = ("--model.backbone", "test_convnext", "--epochs", 5, "--optimizer.lr", "3e-3")
    done = run_command("training/train.py", "--output", tmp_path / "run", *learn)
    assert done.returncode == 0, done.stderr
    attack = ("--objective.attacks", "[{epsilon: 28/255, steps: 4}]", "--optimizer.lr", "4e-3")
    size = ("--trn.width", 12, "--epochs", 3, "--data.validation_limit", 32)
    trn = train_trn(tmp_path / "trn", tmp_path / "run", *size, "--data.limit", 1437, *attack)
    done = run_command(
        "benchmarks/defence_table.py",
        *("--checkpoint", tmp_path / "run", "--trn", trn, "--out", tmp_path / "table.md"),
        *("--limit", 96, "--adaptive_limit", 32, "--epsilon", "28/255"),
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in (tmp_path / "table.md").read_text().splitlines()[4:]]
    table = {row[0].strip(): [cell.split()[0] for cell in row[1:]] for row in rows}
    assert set(table) == {"clean", "FGSM", "FFGSM", "BIM-10", "PGD-10", "MIM-10"}
    clean = float(table.pop("clean")[1])
    assert clean > 85
    for row in table.values():
        alone, restored, _, through_the_map, _, worst = map(float, row)
        assert alone < 40 and restored > max(alone + 30, 0.75 * clean)
        assert worst <= through_the_map < restored
    assert float(table["PGD-10"][0]) < 10 and float(table["PGD-10"][3]) < 30
