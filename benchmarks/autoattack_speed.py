"""evaluate.py's AutoAttack beside pyautoattack alone.

    python benchmarks/autoattack_speed.py --checkpoint runs/cifar10_fast --images data/raw/cifar10

The standard AutoAttack on the same images and weights, without GCM, each as one whole command:
pyautoattack as its authors show it, in one process with a thread per core; evaluate.py, which runs
the same package and adds its controls and report, with a process per core, or one on a GPU. Prints
both robust accuracies, which may differ by their random draws.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from robust_submission.cli.command import run
from robust_submission.data.dataset import ImageDataset, collate
from robust_submission.evaluation.data import DataOptions, open_evaluation_data
from robust_submission.models.load import load_checkpoint
from timing import DEVICE, ON_CPU, Usage, print_table, python, run_command

PROCESSES = len(os.sched_getaffinity(0)) if ON_CPU else 1


@dataclass(kw_only=True)
class Options:
    """What to attack."""

    checkpoint: Path
    """A run folder of an adversarially trained classifier."""
    images: Path
    """Its images as class folders, in test/."""
    limit: int = 1000
    """Test images, stratified by class, drawn with seed 0."""
    alone: Path | None = None
    """Run pyautoattack and write its counts to this file: used by the script itself."""


def attack_alone(options: Options, out: Path) -> None:
    """pyautoattack's standard evaluation, called as in its README."""
    from pyautoattack import AutoAttack

    model = load_checkpoint(options.checkpoint).to(DEVICE)
    data = DataOptions(name="folder", root=options.images)
    chosen = open_evaluation_data(data, None, options.limit, None, seed=0)
    dataset = ImageDataset(chosen.source, np.sort(chosen.indices), model.image_size)
    batch = collate([dataset[place] for place in range(len(dataset))], model.image_size)
    images, labels = batch["images"].to(DEVICE), batch["labels"].to(DEVICE)
    attack = AutoAttack(
        model, norm="Linf", eps=8 / 255, version="standard", seed=0, device=DEVICE.type
    )
    found, _ = attack.run_standard_evaluation(images, labels, batch_size=250)
    with torch.no_grad():
        counts = [int((model(each).argmax(1) == labels).sum()) for each in (images, found)]
    out.write_text(json.dumps(counts))


def run_alone(options: Options, checkpoint: Path, folder: Path) -> tuple[Usage, list[int]]:
    """Usage and counts (clean, robust) of pyautoattack in its own process."""
    out = folder / "alone.json"
    files = ("--checkpoint", checkpoint, "--images", options.images, "--alone", out)
    words = [sys.executable, Path(__file__), *files, "--limit", str(options.limit)]
    usage = run_command(words, threads=torch.get_num_threads())
    return usage, json.loads(out.read_text())


def run_ours(options: Options, checkpoint: Path, folder: Path) -> tuple[Usage, list[int]]:
    """Usage and counts (clean, robust) of evaluate.py, in processes of one thread."""
    report = folder / "report"
    files = ("--checkpoint", checkpoint, "--data.root", options.images, "--out", report)
    choices = ("--data.name=folder", "--attacks=autoattack", "--curves=false")
    limit = f"--limit={options.limit}"
    words = python("inference/evaluate.py", *files, *choices, limit, processes=PROCESSES)
    usage = run_command(words, threads=1, cores=PROCESSES if ON_CPU else None)
    found = json.loads((report / "report.json").read_text())
    (autoattack,) = (
        each
        for each in found["measurements"]
        if (each["attack"], each["attacker"]) == ("autoattack", "oblivious")
    )
    return usage, [found["clean"]["count"], autoattack["robust_accuracy"]["count"]]


def compare(options: Options) -> None:
    """Run one after the other and print the table."""
    if options.alone is not None:
        attack_alone(options, options.alone)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"  # without GCM
        checkpoint.mkdir()
        shutil.copy(options.checkpoint / "model.safetensors", checkpoint)
        config = json.loads((options.checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"conceal": False}))
        ours = run_ours(options, checkpoint, folder)
        alone = run_alone(options, checkpoint, folder)
    found = {
        f"evaluate.py, {PROCESSES} processes of 1 thread": ours,
        f"pyautoattack, 1 process of {torch.get_num_threads()} threads": alone,
    }
    rows = [
        [name, f"{usage.seconds:.0f}", f"{usage.seconds / ours[0].seconds:.2f}", *counts]
        for name, (usage, counts) in found.items()
    ]
    print_table(("command", "seconds", "times ours", "clean", f"robust, of {options.limit}"), rows)


if __name__ == "__main__":
    run(compare, Options)
