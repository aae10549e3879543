"""Weights sharded over two CPU processes train as whole ones do (FSDP2)."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from accelerate.commands import launch

from robust_submission.cli.command import parse
from robust_submission.models.load import load_checkpoint
from robust_submission.training.build import build_training
from robust_submission.training.recipe import Recipe
from tests.conftest import ROOT, run_command

OPTIONS = (
    *("--model.backbone", "test_convnext", "--data.name", "folder", "--optimizer.lr", "2e-3"),
    *("--epochs", "2", "--trackers", "", "--ema_decay", "0.9", "--gradient_accumulation", "2"),
    *("--objective.name", "adversarial", "--objective.steps", "1", "--batch_size", "48"),
)
LAUNCH = (
    *("--config_file", ROOT / "training/accelerate/fsdp.yaml"),
    *("--num_processes", "2", "--main_process_port", "0", "--fsdp_min_num_params", "1000"),
)


def train_sharded(
    images: Path, output: Path, *more: str, **when: Any
) -> subprocess.CompletedProcess[str]:
    folders = ("--data.root", str(images), "--output", str(output))
    description = {"arguments": [*OPTIONS, *folders, *more], **when}
    script = (ROOT / "tests/training/interrupted_run.py", json.dumps(description))
    return run_command(launch.__file__, *LAUNCH, *script, environment={"CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture(scope="module")
def sharded(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sharded") / "run"
    done = train_sharded(few_digits, output)
    assert done.returncode == 0, done.stderr
    return output


def test_it_trains_as_whole_weights_do(sharded: Path, few_digits: Path, tmp_path: Path):
    folders = ("--data.root", few_digits, "--output", tmp_path / "run")
    done = run_command("training/train.py", *OPTIONS, *folders)
    assert done.returncode == 0, done.stderr
    one, two = (pd.read_csv(folder / "metrics.csv") for folder in (tmp_path / "run", sharded))
    np.testing.assert_allclose(one, two, rtol=2e-5)
    for name, weight in load_checkpoint(sharded).state_dict().items():
        whole = load_checkpoint(tmp_path / "run").state_dict()[name]
        np.testing.assert_allclose(weight, whole, atol=1e-4, err_msg=name)
    shards = sharded / "state/epoch-0002/pytorch_model_fsdp_0"
    sizes = [path.stat().st_size for path in shards.glob("*.distcp")]
    assert len(sizes) == 2 and min(sizes) > 0.8 * max(sizes)


def test_it_goes_on_to_the_same_weights(sharded: Path, few_digits: Path, tmp_path: Path):
    output, kill = tmp_path / "run", {"at": "step", "count": 5, "signal": signal.SIGKILL}
    done = train_sharded(few_digits, output, "--save_steps", "1", **kill)
    assert done.returncode != 0 and list((output / "state").glob("epoch-0001*"))
    done = train_sharded(few_digits, output, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "metrics.csv", "summary.json"):
        assert (output / name).read_bytes() == (sharded / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("objective.awp_gamma", "0.01"),
        ("model.channels_last", "true"),
        ("model.freeze_epochs", "1"),
    ],
)
def test_what_needs_whole_weights_is_refused(name: str, value: str):
    words = ("--objective.name", "adversarial", "--checkpoint", "runs/quickstart")
    sharding = Mock(distributed_type="FSDP")
    recipe = parse(Recipe, [*words, f"--{name}", value])
    with pytest.raises(ValueError, match=f"{name}: expected whole weights"):
        build_training(recipe, sharding)
