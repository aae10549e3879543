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
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from robust_submission.cli.command import run
from robust_submission.evaluation.data import open_evaluation_data
from robust_submission.models.load import load_checkpoint
from robust_submission.settings import DataOptions
from timing import DEVICE, ON_CPU, load_images, print_table, python, run_command

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
    loaded = load_images(chosen.source, np.sort(chosen.indices), model.image_size)
    images, labels = (each.to(DEVICE) for each in loaded)
    attack = AutoAttack(
        model, norm="Linf", eps=8 / 255, version="standard", seed=0, device=DEVICE.type
    )
    found, _ = attack.run_standard_evaluation(images, labels, batch_size=250)
    with torch.no_grad():
        counts = [int((model(each).argmax(1) == labels).sum()) for each in (images, found)]
    out.write_text(json.dumps(counts))


def ours_counts(report: Path) -> list[int]:
    """Images that are right when clean and after AutoAttack, of evaluate.py's report."""
    found = json.loads((report / "report.json").read_text())
    (robust,) = (
        each["robust_accuracy"]["count"]
        for each in found["measurements"]
        if (each["attack"], each["attacker"]) == ("autoattack", "oblivious")
    )
    return [found["clean"]["count"], robust]


def compare(options: Options) -> None:
    """Run one after the other and print the table."""
    if options.alone is not None:
        attack_alone(options, options.alone)
        return
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(options.checkpoint / "model.safetensors", folder)
        config = json.loads((options.checkpoint / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"conceal": False}))
        shared = ["--checkpoint", folder, "--limit", str(options.limit)]
        settings = f"--out {folder / 'report'} --attacks autoattack --curves false"
        words = python(
            f"inference/evaluate.py --data.name folder {settings}",
            *("--data.root", options.images, *shared),
            processes=PROCESSES,
        )
        ours = run_command(words, threads=1)
        script = f"benchmarks/autoattack_speed.py --alone {folder / 'alone.json'}"
        words = python(script, "--images", options.images, *shared)
        alone = run_command(words, threads=threads)
        counts = ours_counts(folder / "report"), json.loads((folder / "alone.json").read_text())
    names = (
        f"evaluate.py, {PROCESSES} processes of 1 thread",
        f"pyautoattack, 1 process of {threads} threads",
    )
    rows = [
        [name, f"{usage.seconds:.0f}", f"{usage.seconds / ours.seconds:.2f}", *each]
        for name, usage, each in zip(names, (ours, alone), counts, strict=True)
    ]
    print_table(("command", "seconds", "times ours", "clean", f"robust, of {options.limit}"), rows)


if __name__ == "__main__":
    run(compare, Options)
