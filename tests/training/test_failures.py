"""Losses that are no numbers, and steps that do not fit in memory."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from robust_submission.training.epoch_losses import CHECK_STEPS, EpochLosses
from robust_submission.training.recipe import RunRecipe
from robust_submission.training.run_folder import RunFolder
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
    assert states(output) == {state.name}
    assert not (output / "model.safetensors").exists()


@pytest.fixture
def losses(tmp_path: Path) -> EpochLosses:
    folder = RunFolder(RunRecipe(output=tmp_path / "run"), is_main=True)
    folder.losses = torch.tensor([2.0, 4.0])
    return EpochLosses(folder, CHECK_STEPS + 3, Accelerator(cpu=True))


def test_the_losses_go_on_behind_those_of_the_state(losses: EpochLosses):
    for step in range(CHECK_STEPS + 1):
        losses.add(torch.tensor(float(step)), 0.1, nn.Linear(2, 2))
    expected = (6 + sum(range(CHECK_STEPS + 1))) / (CHECK_STEPS + 3)
    assert float(losses.mean()) == pytest.approx(expected)


def test_a_nan_is_seen_within_so_many_steps(losses: EpochLosses):
    losses.add(torch.tensor(torch.inf), 0.3, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"step 3: .* found inf .* 0\.3; .* none yet"):
        for _ in range(CHECK_STEPS):
            losses.add(torch.tensor(1.0), 0.1, nn.Linear(2, 2))
    assert losses.done == CHECK_STEPS


def test_weights_are_looked_at_too(losses: EpochLosses):
    linear = nn.Linear(2, 2)
    losses.add(torch.tensor(1.0), 0.3, linear)
    losses.check(linear)
    nn.init.constant_(linear.bias, torch.nan)
    with pytest.raises(ValueError, match="step 3: expected finite weights after it"):
        losses.check(linear)


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
    assert lines[1].endswith("with 32 images at once; going on with gradient_accumulation 2.")
    assert lines[2].endswith("with 16 images at once; going on with gradient_accumulation 4.")
    assert_same_run(found, parts)
