"""How much longer does a command take while another one runs on the same cores?

    python benchmarks/busy.py

Trains the quickstart for one epoch, alone and twice at once, with as many threads as there are
cores. Fair shares would take twice as long. It is done with threads that sleep while they wait for
each other, as all commands here have them, and with threads that spin as OpenMP's do by default.
"""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from robust_submission.cli.command import run
from timing import median, print_table, python, take_turns

WAITS = {
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # GNU OpenMP's default, which overrides the policy
}


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    rounds: int = 3
    """How often each is measured."""
    backbone: str = "convnext_atto"
    """What is trained."""


def train(folder: Path, backbone: str, environment: dict[str, str], copies: int) -> None:
    """Train so many networks at once; RuntimeError if one fails."""
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    options = f"--epochs 1 --overwrite --trackers= --model.backbone {backbone}"
    runs = [
        subprocess.Popen(
            python(f"training/train.py {options} --output", folder / str(copy)),
            env=os.environ | threads | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for copy in range(copies)
    ]
    statuses = [each.wait() for each in runs]
    if any(statuses):
        raise RuntimeError(f"train.py {options}: failed")


def compare(options: Options) -> None:
    """Train alone and in pairs, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        begin = partial(train, Path(folder), options.backbone)
        works = {
            f"{threads} {copies}": partial(begin, environment, copies)
            for threads, environment in WAITS.items()
            for copies in (1, 2)
        }
        seconds = take_turns(works, options.rounds, warm_up=0)
    rows = list[list[str]]()
    for threads in WAITS:
        alone, two = (median(seconds, f"{threads} {copies}") for copies in (1, 2))
        rows.append([threads, f"{alone:.1f}", f"{two:.1f}", f"{two / alone:.2f}"])
    print_table(("waiting threads are", "alone, s", "two at once, s", "times as long"), rows)


if __name__ == "__main__":
    run(compare, Options)
