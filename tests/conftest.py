"""Commands run as a user runs them, and one small trained run that many tests share."""

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from safetensors.numpy import load_file
from torch.distributed import run as torchrun

from robust_submission.data.sources import open_source

ROOT = Path(__file__).parents[1]
# The tests are of the CPU, but for those of test_gpu.py. pytest-xdist's workers inherit both.
GPU = os.environ.setdefault("TESTED_GPU", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
SMALL = ("--model.backbone", "test_convnext", "--data.limit", "320", "--optimizer.lr", "2e-3")


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


def ask(request: object) -> int:
    """Have the warm Python do something; its answer."""
    warm = warm_python()
    assert warm.stdin and warm.stdout
    print(json.dumps(request), file=warm.stdin, flush=True)
    return int(warm.stdout.readline())


class Started:
    """A script that runs in a process of its own, `pid`."""

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.words = words
        self.outputs = [NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        self.pid = ask([words, str(folder), environment, *(each.name for each in self.outputs)])

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit status and what it printed, once it has ended; to be called once."""
        status = ask(self.pid)
        stdout, stderr = (each.read() for each in self.outputs)
        return subprocess.CompletedProcess(self.words, status, stdout, stderr)


def start_command(
    script: str | Path,
    *arguments: object,
    processes: int = 1,
    cwd: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Started:
    """Start one of the project's scripts, by torchrun where there are several processes."""
    words = [str(ROOT / script), *map(str, arguments)]
    if processes > 1:
        words = [torchrun.__file__, "--standalone", f"--nproc_per_node={processes}", *words]
    return Started(words, cwd or Path.cwd(), os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def run_command(
    script: str | Path, *arguments: object, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, with the options of `start_command`."""
    return start_command(script, *arguments, **options).wait()


def running(words: str) -> bool:
    """Whether the command line of a process holds these words."""
    found = list[bytes]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found.append(path.read_bytes())
    return any(words.encode() in line for line in found)


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what another process does; an error if it does not."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny ConvNeXt behind GCM, trained on 320 digits for two epochs.

    All test workers share it: not to be written to.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "small_run"
    with FileLock(shared / "small_run.lock"):
        if not (folder / "summary.json").exists():
            done = run_command("training/train.py", "--output", folder, "--epochs", 2, *SMALL)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 16 images a class to train on and 2 to test on, where an attack measures runs."""
    root, digits = tmp_path_factory.mktemp("digits"), open_source("digits")
    for digit in range(10):
        for place, index in enumerate(np.flatnonzero(digits.labels == digit)[:18].tolist()):
            folder = root / ("train" if place < 16 else "test") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.image(index)).save(folder / f"{index}.png")
    return root
