"""What the benchmarks share: timing that holds on a shared machine, and how results are printed.

Contestants take turns, and ratios are taken round by round. A command is timed at two lengths; the
difference over the work between them is the time of a unit of work, without start-up.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from robust_submission.data.dataset import ImageDataset, collate
from robust_submission.data.sources import Source
from robust_submission.runtime import provenance

ROOT = Path(__file__).parents[1]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
CLASSES = 10  # of CIFAR-10
Seconds = Mapping[str, Sequence[float]]
Words = list[str | Path]
# Linux counts the memory of the process that forked as the child's: this launcher is small.
LAUNCHER = """import resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as peak:
    peak.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)"""


@dataclass(kw_only=True)
class CommandOptions:
    """What every comparison of whole commands needs."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg."""
    rounds: int = 3
    """How often each is measured."""


class Usage(NamedTuple):
    """What one process used."""

    seconds: float
    peak: float
    """Largest resident memory in MiB."""


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; `warm_up` rounds before them are not counted.

    The clock is the wall's, or `time.process_time` on one thread.
    """
    seconds = {name: list[float]() for name in contestants}
    for turn in tqdm(range(warm_up + rounds), desc="rounds", leave=False):
        for name, work in contestants.items():
            start = clock()
            work()
            if not ON_CPU:
                torch.accelerator.synchronize()
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def median(seconds: Seconds, name: str) -> float:
    """The median time of a contestant."""
    return statistics.median(seconds[name])


def times_as_fast(seconds: Seconds, name: str, peer: str) -> str:
    """`1.31 (1.28 to 1.35)`: the peer's time over that of `name`, median and range over rounds."""
    ratios = [theirs / own for theirs, own in zip(seconds[peer], seconds[name], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def seconds_per_unit(
    contestants: Mapping[str, Callable[[int], object]], units: int, more: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time per unit of work and start-up time of commands, each run at two lengths.

    Args:
        contestants: By name, a function that runs so many units of work; all take turns.
        units: Units of the shorter run.
        more: Additional units of the longer run.
        rounds: How often each is measured.

    Returns:
        By name and round: seconds per unit, and seconds of the shorter run beyond its units.
    """
    turns = {
        f"{name} {length}": partial(work, length)
        for name, work in contestants.items()
        for length in (units, units + more)
    }
    seconds = take_turns(turns, rounds, warm_up=0)
    per_unit, start_up = dict[str, list[float]](), dict[str, list[float]]()
    for name in contestants:
        shorter, longer = seconds[f"{name} {units}"], seconds[f"{name} {units + more}"]
        pairs = list(zip(shorter, longer, strict=True))
        per_unit[name] = [(long - short) / more for short, long in pairs]
        start_up[name] = [short - units * (long - short) / more for short, long in pairs]
    return per_unit, start_up


def run_command(
    words: Sequence[str | Path], *, threads: int | None = None, cores: int | None = None
) -> Usage:
    """Run a command to its end, silently; RuntimeError with its output if it fails.

    `threads` is OMP_NUM_THREADS of each process; `cores` is how many cores it may use (taskset).
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    if cores:
        chosen = sorted(os.sched_getaffinity(0))[:cores]
        words = ["taskset", "--cpu-list", ",".join(map(str, chosen)), *words]
    with tempfile.NamedTemporaryFile() as peak:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-S", "-c", LAUNCHER, peak.name, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            end = done.stdout.decode(errors="replace")[-8000:]
            raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}\n{end}")
        return Usage(seconds, int(Path(peak.name).read_text()) / 1024)


def python(script: str, *arguments: str | Path, processes: int = 1) -> Words:
    """The command line of one of this project's scripts; torchrun starts several processes.

    `script` is its path in the project and options without spaces; `arguments` stay as they are.
    """
    launcher: Words = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path, *options = script.split()
    return [*launcher, ROOT / path, *options, *arguments]


def make_folder(images: Path, folder: Path, count: int, side: int) -> Path:
    """Write `count` JPEG files into train/<class> and ten into val/<class> of a new folder.

    They are the photographs of train/ and test/ in `images`, resized to a square of `side` pixels;
    photographs repeat where there are fewer.
    """
    for source, split, number in (("train", "train", count), ("test", "val", min(count, CLASSES))):
        classes = sorted(path for path in (images / source).iterdir() if path.is_dir())
        photographs = [sorted(path.glob("*.jpg")) for path in classes]
        for index in range(number):
            place, label = divmod(index, len(classes))
            target = folder / split / classes[label].name
            target.mkdir(parents=True, exist_ok=True)
            with Image.open(photographs[label][place % len(photographs[label])]) as image:
                resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            resized.save(target / f"{place}.jpg", quality=90)
    return folder


def load_images(source: Source, indices: np.ndarray, image_size: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), float32, RGB, 0 to 1, and labels (N,) of a source."""
    dataset = ImageDataset(source, indices, image_size)
    batch = collate([dataset[place] for place in range(len(dataset))], image_size)
    return batch["images"], batch["labels"]


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table, then what it was measured on."""
    for line in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, line))} |")
    print(f"\n{machine()}.")


def machine() -> str:
    """What this was measured on: device, threads, versions."""
    found = provenance()
    hardware, packages = found["hardware"], found["packages"]
    assert isinstance(hardware, dict) and isinstance(packages, dict)
    path = Path("/proc/cpuinfo")
    about = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in about if line.startswith("model name")]
    cpu = f"{hardware['cpu_cores']} CPU cores, {names[0] if names else 'unknown processor'}"
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "timm", "accelerate"))
    return f"{hardware['gpu'] or 'no GPU'}; {cpu}; {hardware['threads']} threads; {versions}"
