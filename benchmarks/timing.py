"""Timing that holds on a shared machine: all take turns, and ratios are taken round by round."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from robust_submission.runtime import provenance

ROOT = Path(__file__).parents[1]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
Seconds = Mapping[str, Sequence[float]]
# Linux counts the memory of the process that forked as the child's own: this one is small.
LAUNCHER = """import resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as peak:
    peak.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)"""


@dataclass(frozen=True)
class Usage:
    """What one process took."""

    seconds: float
    peak: float
    """Largest resident memory of one of its processes, in MiB."""


def synchronize() -> None:
    """Wait for the end of what a GPU is doing."""
    if not ON_CPU:
        torch.accelerator.synchronize()


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Wall seconds of each contestant in each round.

    Args:
        contestants: What to time, by name; in every round each of them runs once.
        rounds: How many are counted.
        warm_up: How many go before them, uncounted.
    """
    seconds = {name: list[float]() for name in contestants}
    for turn in tqdm(range(warm_up + rounds), desc="rounds", leave=False):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: Seconds, name: str) -> float:
    """The median second count of a contestant."""
    return statistics.median(seconds[name])


def times_as_fast(seconds: Seconds, name: str, peer: str) -> str:
    """`1.31 (1.28 to 1.35)`: the peer's time over that of `name`, median and range over rounds."""
    pairs = zip(seconds[peer], seconds[name], strict=True)
    ratios = [theirs / own for theirs, own in pairs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def seconds_per_unit(
    contestants: Mapping[str, tuple[Callable[[], object], Callable[[], object]]],
    units: int,
    more: int,
    rounds: int,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """What a command takes for a unit of work, and to start up, from runs of two lengths.

    Args:
        contestants: By name, a run of `units` units and one of `units + more`; all take turns.
        units: See above.
        more: See above.
        rounds: How often each is measured.

    Returns:
        By name, for each round: seconds a unit; seconds that the shorter run takes beyond its own.
    """
    turns = dict[str, Callable[[], object]]()
    for name, (shorter, longer) in contestants.items():
        turns |= {f"{name}, shorter": shorter, f"{name}, longer": longer}
    seconds = take_turns(turns, rounds, warm_up=0)
    each, start_up = dict[str, list[float]](), dict[str, list[float]]()
    for name in contestants:
        pairs = list(zip(seconds[f"{name}, shorter"], seconds[f"{name}, longer"], strict=True))
        each[name] = [(long - short) / more for short, long in pairs]
        start_up[name] = [
            short - units * slope for (short, _), slope in zip(pairs, each[name], strict=True)
        ]
    return each, start_up


def run_command(
    words: Sequence[str | Path],
    *,
    threads: int | None = None,
    cores: int | None = None,
    cwd: Path | None = None,
) -> Usage:
    """Run a command to its end, silently.

    Args:
        words: Program and arguments.
        threads: Of each process (OMP_NUM_THREADS); None leaves it to the program.
        cores: How many it is held to, by taskset; None: all.
        cwd: Folder to run it in.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if cores is not None:
        chosen = sorted(os.sched_getaffinity(0))[:cores]
        words = ["taskset", "--cpu-list", ",".join(map(str, chosen)), *words]
    with tempfile.NamedTemporaryFile() as peak:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-S", "-c", LAUNCHER, peak.name, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            end = done.stdout.decode(errors="replace")[-8000:]
            raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}\n{end}")
        return Usage(seconds, int(Path(peak.name).read_text()) / 1024)


def python(script: str, *arguments: str | Path, processes: int = 1) -> list[str | Path]:
    """The words that run one of this project's scripts, under torchrun with several processes."""
    launcher: list[str | Path] = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, ROOT / script, *arguments]


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    print("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


def print_machine() -> None:
    """Print what was measured on: device, threads of this process, versions."""
    found = provenance()
    hardware, packages = found["hardware"], found["packages"]
    assert isinstance(hardware, dict) and isinstance(packages, dict)
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "timm", "accelerate"))
    device = f"{hardware['cpu_cores']} CPU cores, {_processor()}"
    if hardware["gpu"]:
        device = f"{hardware['gpu']}; {device}"
    print(f"\n{device}; {torch.get_num_threads()} threads; {versions}.")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
