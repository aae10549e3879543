"""train.py as a command: what it leaves behind; its weights depend on the recipe alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from tests.conftest import ROOT, SMALL, assert_same_weights, run_command

# Everything that draws random numbers: shifts, mixing, drop-path, an average of the weights.
RANDOM = (
    *SMALL,
    *("--data.augmentation", "light", "--mixup.mixup_alpha", "0.2", "--mixup.cutmix_alpha", "1"),
    *("--model.backbone_args", "{drop_path_rate: 0.2}", "--ema_decay", "0.9"),
)
# accelerate has float16 on GPUs alone.
FLOAT16 = f"""
from pathlib import Path

import torch
from accelerate import Accelerator

from robust_submission import runtime
from robust_submission.training.build import build_training
from robust_submission.training.loop import run_training
from robust_submission.training.recipe import Recipe
from robust_submission.cli.command import run


class Float16(Accelerator):
    def __init__(self, **options):
        super().__init__(**options)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**20)


def train(recipe: Recipe) -> None:
    run_training(recipe, build_training)


runtime.Accelerator = Float16
run(train, Recipe, Path("{ROOT}/training/recipes/quickstart.yaml"))
"""


def train(output: Path, *arguments: object, processes: int = 1) -> Path:
    done = run_command("training/train.py", "--output", output, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr
    return output


def test_leaves_a_whole_run_folder(small_run: Path):
    names = {path.name for path in small_run.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "recipe.yaml", "provenance.json", "data.json"),
        *("metrics.csv", "summary.json", "state", "logs", ".lock"),
    }
    states = {path.name for path in (small_run / "state").iterdir()}
    assert states == {"epoch-0001", "epoch-0002"}
    assert list((small_run / "logs").glob("events.out.tfevents.*"))
    assert (small_run / "model.safetensors").stat().st_mode & 0o444 == 0o444  # other users may read
    metrics = pd.read_csv(small_run / "metrics.csv")
    assert list(metrics.columns) == ["epoch", "train_loss", "lr", "val_loss", "val_accuracy"]
    assert metrics["train_loss"].is_monotonic_decreasing and len(metrics) == 2
    recipe = yaml.safe_load((small_run / "recipe.yaml").read_text())
    assert recipe["data"]["limit"] == 320 and recipe["model"]["conceal"] is True


def test_the_recipe_of_a_run_repeats_it(small_run: Path, tmp_path: Path):
    again = train(tmp_path / "again", "--config", small_run / "recipe.yaml")
    assert_same_weights(small_run, again)


def test_one_seed_gives_one_model_whatever_the_workers(tmp_path: Path):
    one, other = (
        train(tmp_path / str(workers), "--epochs", 2, "--data.num_workers", workers, *RANDOM)
        for workers in (0, 4)
    )
    assert_same_weights(one, other)


def test_two_processes_follow_the_loss_of_one(tmp_path: Path):
    mixing = ("--mixup.mixup_alpha", "0.2", "--mixup.cutmix_alpha", "1", "--ema_decay", "0.9")
    one, two = (
        train(tmp_path / str(count), "--epochs", 2, *SMALL, *mixing, processes=count)
        for count in (1, 2)
    )
    rows, rows_of_two = (pd.read_csv(folder / "metrics.csv") for folder in (one, two))
    np.testing.assert_allclose(rows, rows_of_two, rtol=2e-5)  # sums in another order, 16 updates
    assert len(list((two / "state" / "epoch-0002").glob("random_states_*"))) == 2


def test_two_processes_validate_with_one_set_of_statistics(few_digits: Path, tmp_path: Path):
    for split in ("train", "val", "test"):  # 160 images: a micro-batch for each process
        shutil.copytree(few_digits / "train", tmp_path / "data" / split)
    digits = ("--data.name", "folder", "--data.root", tmp_path / "data")
    norms = ("--model.backbone", "test_resnet", "--epochs", 1)
    summary = train(tmp_path / "run", *norms, *digits, processes=2) / "summary.json"
    measured = json.loads(summary.read_text())  # on test images, the same, with what was saved
    assert measured["val_loss"] == measured["test_loss"]


def test_an_accelerate_configuration_starts_two_cpu_processes(tmp_path: Path):
    """Each a Python of its own, no fork of one that has imported everything."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    config = ROOT / "training/accelerate/cpu_2_processes.yaml"
    script = ["training/train.py", "--output", str(tmp_path / "run"), "--epochs", "1", *SMALL]
    done = subprocess.run(
        [*launch, "--config_file", str(config), *script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    states = (tmp_path / "run" / "state" / "epoch-0001").glob("random_states_*")
    assert len(list(states)) == 2


def test_the_learning_rate_is_that_of_the_last_step_at_the_head(tmp_path: Path):
    decay = ("--optimizer.layer_decay", "0.5", "--optimizer.warmup_epochs", 0.5)
    output = train(tmp_path / "run", "--epochs", 1, *decay, *SMALL)
    steps = 320 * 9 // 10 // 32
    expected = 1e-6 + (2e-3 - 1e-6) * (1 + np.cos(np.pi * (steps - 1) / steps)) / 2
    np.testing.assert_allclose(pd.read_csv(output / "metrics.csv")["lr"], [expected])


def test_accumulation_gives_the_same_losses(small_run: Path, tmp_path: Path):
    parts = train(tmp_path / "run", "--epochs", 2, "--gradient_accumulation", 4, *SMALL)
    one, accumulated = (pd.read_csv(folder / "metrics.csv") for folder in (small_run, parts))
    np.testing.assert_allclose(one, accumulated, rtol=2e-5)


def test_adversarial_training_measures_robust_accuracy(tmp_path: Path):
    attack = ("--objective.name", "adversarial", "--objective.steps", 2, "--objective.epsilon")
    output = train(tmp_path / "run", "--epochs", 2, *attack, "16/255", *SMALL)
    last = pd.read_csv(output / "metrics.csv").iloc[-1]
    assert 0 <= last["val_robust_accuracy"] < last["val_accuracy"]


def test_mixed_precision_trains(tmp_path: Path):
    output = train(tmp_path / "run", "--epochs", 2, "--mixed_precision", "bf16", *SMALL)
    assert pd.read_csv(output / "metrics.csv")["train_loss"].is_monotonic_decreasing


def test_float16_trains_once_its_scale_has_come_down(few_digits: Path, tmp_path: Path):
    (tmp_path / "train.py").write_text(FLOAT16)
    output = tmp_path / "run"
    few = ("--data.name", "folder", "--data.root", few_digits, "--batch_size", 16)
    done = run_command(
        *(tmp_path / "train.py", "--output", output, "--epochs", 2, "--mixed_precision", "fp16"),
        *(*SMALL, "--data.limit", 96, *few),
    )
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(output / "metrics.csv")["train_loss"].is_monotonic_decreasing
    scaler = torch.load(output / "state/epoch-0002/scaler.pt")
    assert scaler["scale"] < 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "{bad_key}"], "unknown key optimizer.lrr; nearest known: optimizer.lr."),
        (["--config", "{no_such}"], "expected a recipe, found nothing there"),
        (["--model.backbone", "convnxt_tiny"], "nearest known: convnext_tiny."),
        (
            ["--optimizer.name", "adamww"],
            "optimizer: expected one that timm can build, found adamww",
        ),
        (["--epochs", "0"], "epochs: expected at least 1, found 0."),
        (["--batch_size", "33", "--gradient_accumulation", "2"], "multiple of"),
        (["--batch_size", "4096"], "expected at least 4096 training images"),
        (["--data.name", "folder", "--data.root", "{empty}"], "expected one folder for each class"),
        (["--data.validation_fraction", "0"], "data.validation_fraction: expected above 0"),
        (["--optimizer.clip_grad", "-1"], "optimizer.clip_grad: expected above 0, or null"),
        (["--mixed_precision", "fp16"], "mixed_precision: expected no or bf16 on cpu, found fp16."),
        (
            ["--trackers", "tensorboard,dvclive"],
            "trackers: expected installed trackers (here all, ",
        ),
        (["--trackers", "tensorbord"], "tensorboard), found tensorbord."),
        (["--resume"], "expected a run with a state to resume, found none."),
    ],
)
def test_bad_input_is_named_in_a_line_or_three(tmp_path: Path, arguments: list[str], message: str):
    (tmp_path / "bad.yaml").write_text("optimizer: {lrr: 1}\n")
    (tmp_path / "empty").mkdir()
    paths = {name: tmp_path / file for name, file in [("bad_key", "bad.yaml"), ("empty", "empty")]}
    filled = [word.format(no_such=tmp_path / "none.yaml", **paths) for word in arguments]
    done = run_command("training/train.py", "--output", tmp_path / "run", *filled)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize("words", [("--epochs", "many"), ("--optimizer.lrr", "1")])
def test_usage_errors_exit_with_two(words: tuple[str, str]):
    done = run_command("training/train.py", *words)
    assert done.returncode == 2 and words[0].removeprefix("--") in done.stderr


def test_a_run_is_not_overwritten_unasked(small_run: Path):
    before = (small_run / "model.safetensors").read_bytes()
    done = run_command("training/train.py", "--output", small_run, "--epochs", 1, *SMALL)
    assert done.returncode == 1 and "--resume" in done.stderr
    assert (small_run / "model.safetensors").read_bytes() == before


def test_what_a_crash_left_of_other_states_is_cleared(tmp_path: Path):
    states = tmp_path / "run" / "state"
    for name in ("epoch-0000-step-000001", "epoch-0000-step-000002", "epoch-0007"):
        (states / name).mkdir(parents=True)
    train(tmp_path / "run", "--epochs", 1, "--trackers", "", *SMALL)
    left = {path.name for path in states.iterdir()}
    assert left == {"epoch-0000-step-000002", "epoch-0001"}


def test_only_the_run_that_was_begun_is_resumed(small_run: Path):
    changed = [*SMALL[:-1], "1e-3"]
    done = run_command(
        "training/train.py", "--output", small_run, "--resume", "--epochs", 2, *changed
    )
    assert done.returncode == 1
    assert "expected optimizer.lr = 0.002 as before, found 0.001" in done.stderr


def test_resuming_a_finished_run_only_measures_it_again(small_run: Path, tmp_path: Path):
    before = {name: (small_run / name).read_bytes() for name in ("summary.json", "metrics.csv")}
    shutil.copytree(small_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    train(tmp_path / "run", "--resume", "--data.num_workers", 1, "--epochs", 2, *SMALL)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
