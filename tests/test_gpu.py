"""What is promised of one GPU; skipped where there is none."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import GPU, ROOT, SMALL

TRAINING = (
    *SMALL,
    *("--epochs", "2", "--trackers", "", "--ema_decay", "0.9", "--mixed_precision", "bf16"),
    *("--objective.name", "adversarial", "--objective.steps", "2"),
    *("--objective.awp_gamma", "0.005"),
)
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": GPU}


def run_on_gpu(script: str, *arguments: object) -> str:
    """Run a script to its end; what it printed."""
    words = [sys.executable, ROOT / script, *map(str, arguments)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    asked = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    if subprocess.run(asked, env=ENVIRONMENT).returncode:
        pytest.skip("there is no GPU")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "trained"
    run_on_gpu("training/train.py", "--output", folder, *TRAINING)
    return folder


def test_one_seed_gives_one_model_whatever_the_workers(trained: Path, tmp_path: Path) -> None:
    run_on_gpu(
        "training/train.py", "--output", tmp_path / "run", "--data.num_workers", 2, *TRAINING
    )
    assert_same_bytes("model.safetensors", trained, tmp_path / "run")


def test_what_goes_on_ends_as_what_never_stopped(trained: Path, tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path / "run"), *TRAINING]
    stopped = {"arguments": arguments, "at": "step", "count": 5, "signal": signal.SIGTERM}
    printed = run_on_gpu("tests/training/interrupted_run.py", json.dumps([stopped]))
    assert json.loads(printed.splitlines()[-1]) == [128 + signal.SIGTERM]
    run_on_gpu("training/train.py", *arguments, "--resume")
    for name in ("model.safetensors", "metrics.csv"):
        assert_same_bytes(name, trained, tmp_path / "run")


@pytest.mark.parametrize("parts", [1, 2])
def test_compiled_training_follows_its_loss(trained: Path, tmp_path: Path, parts: int) -> None:
    options = (*TRAINING, "--model.compile", "true", "--gradient_accumulation", parts)
    run_on_gpu("training/train.py", "--output", tmp_path / "run", *options)
    eager, compiled = (
        pd.read_csv(folder / "metrics.csv")["train_loss"] for folder in (trained, tmp_path / "run")
    )
    assert compiled.tolist() == pytest.approx(eager.tolist(), rel=0.05)


def test_predictions_are_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    choices = {"one": (), "other": ("--batch_size", 7, "--num_workers", 2)}
    for name, choice in choices.items():
        out = ("--out", tmp_path / name / "sub.csv", "--format", "csv", "--probabilities", "true")
        (tmp_path / name).mkdir()
        run_on_gpu("inference/predict.py", "--checkpoint", trained, *out, *choice)
    assert_same_bytes("sub.csv", tmp_path / "one", tmp_path / "other")


def test_reports_are_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    options = ("--limit", 24, "--attacks", "pgd,autoattack", "--steps", 3, "--curves", "false")
    for name, choice in {"one": (), "other": ("--batch_size", 7, "--num_workers", 2)}.items():
        out = ("--out", tmp_path / name)
        run_on_gpu("inference/evaluate.py", "--checkpoint", trained, *out, *options, *choice)
    for name in ("report.json", "per_image.csv"):
        assert_same_bytes(name, tmp_path / "one", tmp_path / "other")


def test_a_compiled_evaluation_finds_nearly_the_same(trained: Path, tmp_path: Path) -> None:
    options = ("--limit", 64, "--attacks", "pgd,autoattack", "--curves", "false")
    for choice in ("false", "true"):
        out = ("--out", tmp_path / choice, "--compile", choice)
        run_on_gpu("inference/evaluate.py", "--checkpoint", trained, *out, *options)
    eager, compiled = (
        pd.read_csv(tmp_path / choice / "per_image.csv").filter(like=" robust")
        for choice in ("false", "true")
    )
    assert ((eager - compiled).abs().mean() <= 0.05).all()  # rounding decides a few


def assert_same_bytes(name: str, one: Path, other: Path) -> None:
    assert (one / name).read_bytes() == (other / name).read_bytes(), name
