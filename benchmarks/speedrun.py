"""How robust a classifier can this machine train, in how many minutes?

    make speedrun

Trains `training/recipes/speedrun.yaml` on CIFAR-10, evaluates the best epoch under AutoAttack (Linf
8/255) on test images that are drawn with the seed and stratified by class, and prints one line. A
GPU trains a larger network by the same recipe, in bfloat16 and compiled. The minutes are those of
the whole training command: start, reading, validation in each epoch, and the test of the best one.
"""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from robust_submission.cli.command import run
from timing import ON_CPU, ROOT, machine, python

RECIPE = ROOT / "training" / "recipes" / "speedrun.yaml"
ON_GPU = """
    --model.backbone convnext_tiny
    --model.backbone_args
    {"patch_size":1,"kernel_sizes":3,"ls_init_value":0.1,"dims":[64,192,384,768],"depths":[0,3,9,3]}
    --batch_size 512 --epochs 25 --optimizer.warmup_epochs 1 --ema_decay 0.996
    --mixed_precision bf16 --model.compile true --data.num_workers 8
"""


@dataclass(kw_only=True)
class Options:
    """What to train on, and what to measure."""

    images: Path = Path("data/raw/cifar10")
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg."""
    output: Path = Path("runs/speedrun")
    """The run folder; its report is in `report` in it."""
    epochs: int | None = None
    """Instead of the recipe's."""
    limit: int = 1000
    """Test images under AutoAttack."""
    seed: int = 0
    """Of training and of the choice of test images."""


def measure(options: Options) -> None:
    """Train, evaluate, and print the line."""
    output, report = options.output, options.output / "report"
    shared = ["--data.name", "folder", "--data.root", options.images, "--seed", str(options.seed)]
    train = [*python("training/train.py"), "--config", RECIPE, *shared]
    if not ON_CPU:
        train += ON_GPU.split()
    if options.epochs:
        train += ["--epochs", str(options.epochs)]
    start = time.perf_counter()
    subprocess.run([*train, "--output", output, "--overwrite"], check=True)
    minutes = (time.perf_counter() - start) / 60
    attack = f"--attacks autoattack --curves false --limit {options.limit}"
    places = ["--checkpoint", output, "--out", report, *shared]
    subprocess.run(python(f"inference/evaluate.py {attack}", *places), check=True)
    found = json.loads((report / "report.json").read_text())
    clean, robust = (
        f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
        for share in (found["clean"], found["adaptive"])
    )
    print(
        f"speedrun: {minutes:.1f} minutes, clean {clean}, AutoAttack at Linf 8/255 at most "
        f"{robust}, {found['clean']['total']} test images, seed {options.seed}; {machine()}."
    )


if __name__ == "__main__":
    run(measure, Options)
