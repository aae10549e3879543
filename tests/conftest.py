"""Commands run as a user runs them, and one small trained run that many tests share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ("--model.backbone", "test_convnext", "--data.limit", "320", "--optimizer.lr", "2e-3")
Command = Callable[..., subprocess.CompletedProcess[str]]


def run_command(
    script: str, *arguments: object, processes: int = 1, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the project's scripts, under torchrun where there are several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny ConvNeXt behind GCM, trained on 320 digits for two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = run_command("training/train.py", "--output", folder, "--epochs", 2, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder
