"""Losses that are not finite, and steps that do not fit in memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from robust_submission.cli.errors import UserError
from robust_submission.training.loop import (
    CHECK_STEPS,
    explain_batch_norm,
    require_finite,
    require_smaller_parts,
)
from robust_submission.training.objectives import CrossEntropy, MixedCrossEntropy, Mixing
from tests.conftest import SMALL
from tests.training.test_resume import RANDOM, assert_same_run, described, run_all, states


def test_a_nan_stops_the_run_and_leaves_the_last_state(tmp_path: Path):
    output = tmp_path / "run"
    options = (*RANDOM, "--save_steps", "2")
    statuses, done = run_all(described(output, options, nan=6))
    assert statuses == [1]
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("error")]
    state = output / "state" / "epoch-0000-step-000004"
    assert line == (
        "error: epoch 1, step 6: expected a finite loss, found nan at a learning rate of "
        f"0.001111; the last good state is {state}."
    )
    assert states(output) == {"epoch-0000-step-000002", state.name}
    assert not (output / "model.safetensors").exists()


def test_a_nan_is_found_within_so_many_steps_without_saving(tmp_path: Path):
    """Of the 60 steps of an epoch; a loss or weight of each was looked at by the end."""
    options = (*SMALL, "--epochs", "1", "--trackers", "", "--batch_size", "4")
    statuses, done = run_all(described(tmp_path / "run", options, nan=3))
    assert statuses == [1]
    assert "epoch 1, step 3: expected a finite loss" in done.stderr
    assert "the last good state is none yet." in done.stderr
    assert f"{CHECK_STEPS - 1}/72" in done.stderr and "/72 " not in done.stderr.split("error")[1]


def test_losses_and_weights_are_checked(tmp_path: Path):
    linear: Any = nn.Linear(2, 2)
    training: Any = SimpleNamespace(accelerator=Accelerator(cpu=True), classifier=linear)
    folder: Any = SimpleNamespace(rows=[{}], last_state=lambda: None)
    losses, rates = torch.tensor([2.0, 4.0, 1.0]), [0.1, 0.2, 0.3]
    require_finite(training, folder, losses, rates)
    nn.init.constant_(linear.bias, torch.nan)
    with pytest.raises(UserError, match=r"epoch 2, step 3: expected finite weights after .* 0\.3;"):
        require_finite(training, folder, losses, rates)
    losses[1] = torch.inf
    with pytest.raises(UserError, match=r"step 2: expected a finite loss, found inf .* 0\.2;"):
        require_finite(training, folder, losses, rates)


def test_batch_norm_of_one_image_names_the_options():
    training: Any = SimpleNamespace(accelerator=SimpleNamespace(gradient_accumulation_steps=8))
    with pytest.raises(ValueError) as raised:
        nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    with pytest.raises(UserError, match=r"batch_size: .* found 1: .* gradient_accumulation\."):
        explain_batch_norm(training, 8, raised.value)
    explain_batch_norm(training, 8, ValueError("another"))  # for its caller to raise


@pytest.mark.parametrize(
    ("objective", "parts"), [(CrossEntropy(), 1), (MixedCrossEntropy(mixing=Mixing()), 2)]
)
def test_parts_are_halved_as_long_as_pairs_stay_together(objective: object, parts: int):
    accelerator = SimpleNamespace(gradient_accumulation_steps=1)
    recipe = SimpleNamespace(auto_batch_size=True)
    training: Any = SimpleNamespace(recipe=recipe, accelerator=accelerator, objective=objective)
    require_smaller_parts(training, 2 * parts, MemoryError())
    with pytest.raises(UserError, match=f"out of memory with {3 * parts} images at once"):
        require_smaller_parts(training, 3 * parts, MemoryError())


def test_out_of_memory(tmp_path: Path):
    """32 images do not fit and neither do 16: as with 4 parts from the start."""
    options = (*SMALL, "--epochs", "1", "--trackers", "", "--ema_decay", "0.9")
    alone, found, parts = tmp_path / "alone", tmp_path / "found", tmp_path / "parts"
    statuses, done = run_all(
        described(alone, options, images=8),
        described(found, options, "--auto_batch_size", images=8),
        described(parts, options, "--gradient_accumulation", "4", images=8),
    )
    assert statuses == [1, 0, 0], done.stderr
    lines = [each for each in done.stderr.splitlines() if "out of memory" in each]
    assert len(lines) == 3 and "Traceback" not in done.stderr
    for setting in ("gradient_accumulation", "auto_batch_size", "mixed_precision", "batch_size"):
        assert setting in lines[0]
    assert lines[1].endswith("with 32 images at once; continuing with gradient_accumulation 2.")
    assert lines[2].endswith("with 16 images at once; continuing with gradient_accumulation 4.")
    assert_same_run(found, parts)
