"""The commands keep what they compute on the device that accelerate gives them."""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd

from tests.conftest import ROOT, run_command

GPU = "tests/pretended_gpu.py"
TRAINING = (
    *("--model.backbone", "test_convnext", "--data.name", "folder", "--epochs", "2"),
    *("--trackers", "", "--ema_decay", "0.9", "--gradient_accumulation", "2"),
    *("--objective.name", "adversarial", "--objective.steps", "2"),
    *("--objective.awp_gamma", "0.005"),
)
REFUSED = """
import pytest
import torch

from robust_submission.runtime import start_accelerator

here, there = torch.ones(2, 3), torch.ones(2, 3, device=start_accelerator().device)
index = torch.tensor([0])
for refused in (
    lambda: here + there,
    lambda: there.add_(here),
    lambda: torch.cat([here, there]),
    lambda: here[index.to(there.device)],
    lambda: there.index_put_((index,), here[:1]),
    lambda: there.numpy(),
):
    with pytest.raises((RuntimeError, TypeError), match="pretended"):
        refused()
assert (there[index] * torch.tensor(2.0)).tolist() == [[2.0] * 3]
print("done")
"""

SHORT_AUTOATTACK = """
import runpy
import sys

from robust_submission.attacks.external import AutoAttack

AutoAttack.STANDARD = ("apgd-ce", "square")
AutoAttack.__init__.__kwdefaults__["queries"] = 5
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def done_on_gpu(script: object, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = run_command(GPU, script, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def test_it_refuses_what_a_gpu_would(tmp_path: Path):
    script = tmp_path / "refused.py"
    script.write_text(REFUSED)
    assert done_on_gpu(script).stdout == "done\n"


def test_training_goes_on_and_ends_as_on_the_cpu(few_digits: Path, tmp_path: Path):
    ours, theirs = tmp_path / "gpu", tmp_path / "cpu"
    options = (*TRAINING, "--data.root", str(few_digits))
    arguments = ["--output", str(ours), *options]
    stopped = {"arguments": arguments, "at": "step", "count": 5, "signal": signal.SIGTERM}
    run_command(GPU, "tests/training/interrupted_run.py", json.dumps(stopped))
    assert not (ours / "summary.json").exists() and list((ours / "state").iterdir())
    done_on_gpu("training/train.py", *arguments, "--resume")
    done = run_command("training/train.py", "--output", theirs, *options)
    assert done.returncode == 0, done.stderr
    found, expected = (pd.read_csv(folder / "metrics.csv") for folder in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_trn_is_trained_and_measured_and_predicts_as_on_the_cpu(small_run: Path, tmp_path: Path):
    run = tmp_path / "trn"
    done_on_gpu(
        *("training/train_trn.py", "--checkpoint", small_run, "--output", run),
        *("--data.limit", "160", "--epochs", "1", "--trackers", "", "--trn.width", "8"),
        *("--trn.depth", "1", "--objective.end_to_end", "true"),
    )
    done_on_gpu(
        *("inference/evaluate.py", "--checkpoint", run, "--out", tmp_path / "report"),
        *("--limit", "4", "--attacks", "pgd", "--steps", "2", "--curves", "false"),
    )
    ours, theirs = tmp_path / "gpu.csv", tmp_path / "cpu.csv"
    arguments = ("--checkpoint", run, "--limit", "40")
    done_on_gpu("inference/predict.py", *arguments, "--out", ours)
    done = run_command("inference/predict.py", *arguments, "--out", theirs)
    assert done.returncode == 0, done.stderr
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_attack_of_several_parts(small_run: Path, tmp_path: Path):
    script = tmp_path / "short_autoattack.py"
    script.write_text(SHORT_AUTOATTACK)
    done_on_gpu(
        *(script, ROOT / "inference/evaluate.py", "--checkpoint", small_run, "--limit", "4"),
        *("--attacks", "autoattack", "--curves", "false", "--out", tmp_path / "report"),
    )
