"""Weights sharded over two CPU processes train as whole ones do (FSDP2)."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from cli.command import parse
from models.classifier import load_checkpoint
from tests.conftest import ROOT, run_command
from training.build import build_training
from training.recipe import Recipe

OPTIONS = (
    *("--model.backbone", "test_convnext", "--data.limit", "160", "--optimizer.lr", "2e-3"),
    *("--epochs", "2", "--trackers", "", "--ema_decay", "0.9", "--gradient_accumulation", "2"),
    *("--objective.name", "adversarial", "--objective.steps", "1"),
)
LAUNCH = (
    *("accelerate.commands.launch", "--config_file", "training/accelerate/fsdp.yaml"),
    *("--num_processes", "2", "--main_process_port", "0", "--fsdp_min_num_params", "1000"),
)


def train_sharded(output: Path, *more: str, **when: Any) -> subprocess.CompletedProcess[str]:
    description = {"arguments": ["--output", str(output), *OPTIONS, *more], **when}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            *LAUNCH,
            "tests/training/interrupted_run.py",
            json.dumps(description),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sharded") / "run"
    done = train_sharded(output)
    assert done.returncode == 0, done.stderr
    return output


def test_it_trains_as_whole_weights_do(sharded: Path, tmp_path: Path):
    done = run_command("training/train.py", "--output", tmp_path / "run", *OPTIONS)
    assert done.returncode == 0, done.stderr
    one, two = (pd.read_csv(folder / "metrics.csv") for folder in (tmp_path / "run", sharded))
    np.testing.assert_allclose(one, two, rtol=2e-5)
    for name, weight in load_checkpoint(sharded).state_dict().items():
        whole = load_checkpoint(tmp_path / "run").state_dict()[name]
        np.testing.assert_allclose(weight, whole, atol=1e-4, err_msg=name)
    shards = sharded / "state/epoch-0002/pytorch_model_fsdp_0"
    sizes = [path.stat().st_size for path in shards.glob("*.distcp")]
    assert len(sizes) == 2 and min(sizes) > 0.8 * max(sizes)


def test_it_goes_on_to_the_same_weights(sharded: Path, tmp_path: Path):
    output = tmp_path / "run"
    done = train_sharded(output, "--save_steps", "1", at="step", count=6, signal=signal.SIGKILL)
    assert done.returncode != 0 and list((output / "state").glob("epoch-0001*"))
    done = train_sharded(output, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "metrics.csv", "summary.json"):
        assert (output / name).read_bytes() == (sharded / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "value"), [("objective.awp_gamma", "0.01"), ("model.channels_last", "true")]
)
def test_what_needs_whole_weights_is_refused(name: str, value: str):
    words, sharding = ("--objective.name", "adversarial"), Mock(distributed_type="FSDP")
    recipe = parse(Recipe, [*words, f"--{name}", value])
    with pytest.raises(ValueError, match=f"{name}: expected whole weights"):
        build_training(recipe, sharding, Mock())
