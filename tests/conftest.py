"""Commands run as a user runs them, and one small trained run that many tests share."""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
from torch.distributed import run as torchrun

ROOT = Path(__file__).parents[1]
SMALL = ("--model.backbone", "test_convnext", "--data.limit", "320", "--optimizer.lr", "2e-3")
Command = Callable[..., subprocess.CompletedProcess[str]]


@cache
def warm_python() -> subprocess.Popen[str]:
    """Runs scripts without importing torch anew."""
    python = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/warm_python.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    atexit.register(python.communicate)  # the end of its input is the end of it
    return python


def run_command(
    script: str, *arguments: object, processes: int = 1, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the project's scripts, under torchrun where there are several processes."""
    words = [str(ROOT / script), *map(str, arguments)]
    if processes > 1:
        words = [torchrun.__file__, "--standalone", f"--nproc_per_node={processes}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with NamedTemporaryFile("r") as stdout, NamedTemporaryFile("r") as stderr:
        request = [words, str(cwd or Path.cwd()), environment, stdout.name, stderr.name]
        warm = warm_python()
        assert warm.stdin and warm.stdout
        print(json.dumps(request), file=warm.stdin, flush=True)
        status = int(warm.stdout.readline())
        return subprocess.CompletedProcess(words, status, stdout.read(), stderr.read())


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny ConvNeXt behind GCM, trained on 320 digits for two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = run_command("training/train.py", "--output", folder, "--epochs", 2, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder
