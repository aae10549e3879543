"""How fast is evaluate.py's AutoAttack, beside pyautoattack alone?

    python benchmarks/autoattack_speed.py --checkpoint runs/cifar10_fast \\
        --images data/raw/cifar10

The standard AutoAttack on the same images and weights, without GCM, each as one whole command:
pyautoattack by itself as its authors show it, in one process with a thread a core; evaluate.py with
a process a core, or one on a GPU, which runs the same package, finds FAB's nearest points without
sorting, and adds its controls and its report.
Prints both robust accuracies, which may differ by what their random draws differ. With
`--one_process` also evaluate.py on one core: how much the other processes give.
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
from torch import Tensor

from robust_submission.cli.command import run
from robust_submission.cli.files import atomic_write
from robust_submission.data.dataset import ImageDataset, collate
from robust_submission.evaluation.evaluation_data import DataOptions, open_evaluation_data
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from timing import DEVICE, ON_CPU, Usage, print_machine, print_table, python, run_command

PROCESSES = len(os.sched_getaffinity(0)) if ON_CPU else 1


@dataclass(kw_only=True)
class Options:
    """What to attack."""

    checkpoint: Path
    """A run folder of an adversarially trained classifier."""
    images: Path
    """Its images as class folders, in test/."""
    limit: int = 1000
    """So many test images, stratified by class, drawn with seed 0."""
    one_process: bool = False
    """Run evaluate.py on one core too."""
    alone: Path | None = None
    """Run pyautoattack alone and write here what withstood it: what the script starts."""


def attack_alone(options: Options, out: Path) -> None:
    """pyautoattack's standard evaluation, called as in its README."""
    from pyautoattack import AutoAttack

    model = load_checkpoint(options.checkpoint)
    images, labels = (each.to(DEVICE) for each in chosen_images(options, model))
    model = model.to(DEVICE)
    attack = AutoAttack(
        model, norm="Linf", eps=8 / 255, version="standard", seed=0, device=DEVICE.type
    )
    with torch.no_grad():
        clean = int((model(images).argmax(1) == labels).sum())
    found, _ = attack.run_standard_evaluation(images, labels, batch_size=250)
    with torch.no_grad():
        robust = int((model(found).argmax(1) == labels).sum())
    with atomic_write(out) as path:
        path.write_text(json.dumps({"clean": clean, "robust": robust}))


def chosen_images(options: Options, model: RobustClassifier) -> tuple[Tensor, Tensor]:
    """The images that evaluate.py chooses, (N, 3, H, W), and their labels (N,)."""
    data = DataOptions(name="folder", root=options.images)
    chosen = open_evaluation_data(data, None, options.limit, None, seed=0)
    dataset = ImageDataset(chosen.source, np.sort(chosen.indices), model.image_size)
    batch = collate([dataset[place] for place in range(len(dataset))], model.image_size)
    return batch["images"], batch["labels"]


def revealed_copy(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with GCM switched off in its configuration."""
    folder.mkdir()
    shutil.copy(checkpoint / "model.safetensors", folder)
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"conceal": False}))
    return folder


def run_alone(options: Options, checkpoint: Path, folder: Path) -> tuple[Usage, dict[str, int]]:
    """pyautoattack in a process of its own."""
    out = folder / "alone.json"
    files = ("--checkpoint", checkpoint, "--images", options.images, "--alone", out)
    words = [sys.executable, Path(__file__), *files, "--limit", str(options.limit)]
    usage = run_command(words, threads=torch.get_num_threads())
    return usage, json.loads(out.read_text())


def run_ours(
    options: Options, checkpoint: Path, folder: Path, processes: int
) -> tuple[Usage, dict[str, int]]:
    """evaluate.py with processes of one thread, on as many cores."""
    report = folder / f"report_{processes}"
    files = ("--checkpoint", checkpoint, "--data.root", options.images, "--out", report)
    choices = ("--data.name=folder", "--attacks=autoattack", "--curves=false")
    limit = f"--limit={options.limit}"
    words = python("inference/evaluate.py", *files, *choices, limit, processes=processes)
    usage = run_command(words, threads=1, cores=processes if ON_CPU else None)
    found = json.loads((report / "report.json").read_text())
    (autoattack,) = (
        each
        for each in found["measurements"]
        if (each["attack"], each["attacker"]) == ("autoattack", "oblivious")
    )
    return usage, {
        "clean": found["clean"]["count"],
        "robust": autoattack["robust_accuracy"]["count"],
    }


def compare(options: Options) -> None:
    """Run one after the other and print the table."""
    if options.alone is not None:
        attack_alone(options, options.alone)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = revealed_copy(options.checkpoint, folder / "checkpoint")
        ours = run_ours(options, checkpoint, folder, PROCESSES)
        alone = run_alone(options, checkpoint, folder)
        one = run_ours(options, checkpoint, folder, 1) if options.one_process else None
    found = {
        f"evaluate.py, {PROCESSES} processes of 1 thread": ours,
        f"pyautoattack, 1 process of {torch.get_num_threads()} threads": alone,
    }
    if one is not None:
        found["evaluate.py, 1 process of 1 thread"] = one
    rows = [
        [
            name,
            f"{usage.seconds:.0f}",
            f"{usage.seconds / ours[0].seconds:.2f}",
            f"{counts['clean']:.0f}",
            f"{counts['robust']:.0f}",
        ]
        for name, (usage, counts) in found.items()
    ]
    withstood = f"withstood, of {options.limit}"
    print_table(("command", "seconds", "times the first's", "clean", withstood), rows)
    print_machine()


if __name__ == "__main__":
    run(compare, Options)
