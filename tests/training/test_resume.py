"""Runs that are killed and stopped at any step go on to the same bytes."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robust_submission.data.sources import open_source
from tests.conftest import ROOT, SMALL, run_command

DRIVER = "tests/training/interrupted_run.py"
# 9 steps an epoch, with everything that draws random numbers.
RANDOM = (
    *SMALL,
    *("--epochs", "2", "--trackers", "", "--data.augmentation", "light", "--ema_decay", "0.9"),
    *("--mixup.mixup_alpha", "0.2", "--mixup.cutmix_alpha", "1"),
    *("--model.backbone_args", "{drop_path_rate: 0.2}"),
)
ADVERSARIAL = (
    *("--model.backbone", "test_convnext", "--data.name", "folder", "--optimizer.lr", "2e-3"),
    *("--epochs", "2", "--trackers", "", "--objective.name", "adversarial"),
    *("--objective.steps", "1", "--objective.step_size", "10/255", "--objective.awp_gamma", "0.01"),
)


def described(
    output: Path, options: tuple[object, ...], *more: object, **when: Any
) -> dict[str, Any]:
    return {"arguments": [*map(str, ("--output", output, *options, *more))], **when}


def run_all(*descriptions: dict[str, Any]) -> tuple[list[int], subprocess.CompletedProcess[str]]:
    """The exit status of each run."""
    done = run_command(DRIVER, json.dumps(descriptions))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


def assert_same_run(first: Path, second: Path) -> None:
    """The best checkpoint, the figures, and the weights and their average at the end."""
    end = first / "state" / max(states(first))
    last = [path.relative_to(first) for path in end.glob("*.safetensors")]
    assert last
    for name in ("model.safetensors", "metrics.csv", "summary.json", *last):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def states(output: Path) -> set[str]:
    return {path.name for path in (output / "state").iterdir()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "run"
    statuses, done = run_all(described(output, RANDOM))
    assert statuses == [0], done.stderr
    return output


def test_killed_at_random_steps(reference: Path, tmp_path: Path):
    """Each of the five makes 3 to 5 steps and loses one or two of them: 18 in all, 2 more kept."""
    counts = np.random.default_rng(0).integers(4, 6, size=5).tolist()
    output, options = tmp_path / "run", (*RANDOM, "--save_steps", "2")
    kill = {"at": "step", "signal": signal.SIGKILL}
    first, *others = counts
    statuses, done = run_all(
        described(output, options, count=first, **kill),
        *(described(output, options, "--resume", count=count, **kill) for count in others),
        described(output, options, "--resume"),
    )
    assert statuses == [-signal.SIGKILL] * 5 + [0], done.stderr
    assert_same_run(reference, output)
    assert max(states(output)) == "epoch-0002" and len(states(output)) == 2


def test_killed_while_a_state_is_saved(reference: Path, tmp_path: Path):
    output, options = tmp_path / "run", (*RANDOM, "--save_steps", "4")
    statuses, done = run_all(
        described(output, options, at="save", count=2, signal=signal.SIGKILL),
    )
    assert statuses == [-signal.SIGKILL], done.stderr
    assert states(output) == {"epoch-0000-step-000004", "partial"}
    statuses, done = run_all(described(output, RANDOM, "--resume"))  # save_steps may change
    assert statuses == [0], done.stderr
    assert_same_run(reference, output)


def test_killed_before_the_validation_and_before_the_best_is_kept(reference: Path, tmp_path: Path):
    output, kill = tmp_path / "run", {"count": 1, "signal": signal.SIGKILL}
    statuses, done = run_all(
        described(output, (*RANDOM, "--save_steps", "4"), at="validation", **kill),
    )
    assert statuses == [-signal.SIGKILL], done.stderr
    assert states(output) == {"epoch-0000-step-000008", "epoch-0000-step-000009"}
    statuses, done = run_all(described(output, RANDOM, "--resume", at="best", **kill))
    assert statuses == [-signal.SIGKILL], done.stderr
    assert (
        states(output) == {"epoch-0000-step-000009", "epoch-0001"}
        and not (output / "model.safetensors").exists()
    )
    statuses, done = run_all(described(output, RANDOM, "--resume", at="step", **kill))
    assert statuses == [-signal.SIGKILL] and (output / "model.safetensors").exists(), done.stderr
    statuses, done = run_all(described(output, RANDOM, "--resume"))
    assert statuses == [0], done.stderr
    assert_same_run(reference, output)


def test_signals_stop_after_the_step(reference: Path, tmp_path: Path):
    output = tmp_path / "run"
    statuses, done = run_all(
        described(output, RANDOM, at="step", count=5, signal=signal.SIGTERM),
    )
    assert statuses == [143]
    assert states(output) == {"epoch-0000-step-000005"}
    line = "SIGTERM: stopped after epoch 1, step 5 of 9; continue with --resume."
    assert line in done.stderr and "Traceback" not in done.stderr
    statuses, done = run_all(
        described(output, RANDOM, "--resume", at="step", count=4, signal=signal.SIGINT),
        described(output, RANDOM, "--resume", at="save", count=1, signal=signal.SIGINT),
        described(output, RANDOM, "--resume"),
    )
    assert statuses == [130, 130, 0], done.stderr
    assert "SIGINT: stopped after epoch 1, step 9 of 9" in done.stderr
    assert "SIGINT: stopped after epoch 1; continue with --resume." in done.stderr
    assert_same_run(reference, output)


def test_extra_images_go_on_within_an_epoch(tmp_path: Path):
    digits = open_source("digits", split="test")
    images = np.stack([digits.image(index) for index in range(50)])
    np.savez(tmp_path / "a.npz", image=images, label=np.asarray(digits.labels)[:50])
    whole, output = tmp_path / "whole", tmp_path / "run"
    options = (*RANDOM, "--data.extra.root", tmp_path / "a.npz", "--data.extra.fraction", "0.7")
    statuses, done = run_all(
        described(whole, options),
        described(output, options, at="step", count=13, signal=signal.SIGTERM),
        described(output, options, "--resume", "--data.num_workers", "2"),
    )
    assert statuses == [0, 143, 0], done.stderr
    assert "stopped after epoch 2, step 4 of 9" in done.stderr
    assert_same_run(whole, output)


@pytest.mark.parametrize("saving", [(), ("--save_steps", "4")])
def test_a_signal_during_validation_stops_at_once(
    reference: Path, tmp_path: Path, saving: tuple[str, ...]
):
    output, term = tmp_path / "run", {"at": "measure", "count": 1, "signal": signal.SIGTERM}
    statuses, done = run_all(
        described(output, (*RANDOM, *saving), **term),
        described(output, RANDOM, "--resume", **term),
        described(output, RANDOM, "--resume"),
    )
    assert statuses == [143, 143, 0], done.stderr
    assert done.stderr.count("SIGTERM: stopped after the last step of epoch 1; continue with") == 2
    assert_same_run(reference, output)


def test_adversarial_training_goes_on_within_an_epoch(few_digits: Path, tmp_path: Path):
    whole, output, saving = tmp_path / "whole", tmp_path / "run", ("--save_steps", "1")
    options = (*ADVERSARIAL, "--data.root", str(few_digits))
    statuses, done = run_all(
        described(whole, options),
        described(output, options, *saving, at="step", count=3, signal=signal.SIGKILL),
        described(output, options, "--resume", at="step", count=4, signal=signal.SIGTERM),
        described(output, options, "--resume"),
    )
    assert statuses == [0, -signal.SIGKILL, 143, 0], done.stderr
    assert_same_run(whole, output)


def test_two_processes_stop_after_the_same_step(few_digits: Path, tmp_path: Path):
    """The second gets the signal in its 5th step; both look one step later. It has no test image:
    the 20 are a micro-batch."""
    options = (*RANDOM, "--batch_size", "16", "--data.name", "folder", "--data.root", few_digits)

    def start(output: Path, *more: str, **when: Any) -> subprocess.CompletedProcess[str]:
        return run_command(
            DRIVER, json.dumps(described(output, options, *more, **when)), processes=2
        )

    whole, output = tmp_path / "whole", tmp_path / "run"
    done = start(whole)
    assert done.returncode == 0, done.stderr
    done = start(output, at="step", count=5, signal=signal.SIGTERM)
    assert done.returncode != 0 and "exitcode  : 143" in done.stderr
    assert (
        done.stderr.count("SIGTERM: stopped after epoch 1, step 6 of 9; continue with --resume.")
        == 1
    )
    assert states(output) == {"epoch-0000-step-000006"}
    done = start(output, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, output)


def test_a_full_disk_leaves_the_last_state(tmp_path: Path):
    """No file may grow past 100 kB, which the weights do: what stands there is not touched."""
    output, options = tmp_path / "run", (*RANDOM, "--epochs", "1", "--save_steps", "2")
    statuses, _ = run_all(described(output, options, at="step", count=4, signal=signal.SIGKILL))
    assert statuses == [-signal.SIGKILL] and states(output) == {"epoch-0000-step-000002"}
    before = {path: path.read_bytes() for path in (output / "state").rglob("*.safetensors")}
    arguments = described(output, options, "--resume")["arguments"]
    done = run_command("tests/small_files.py", 100_000, ROOT / "training/train.py", *arguments)
    assert done.returncode == 1 and "not written" in done.stderr
    assert before == {path: path.read_bytes() for path in before}
