"""Two processes of one thread beside one: training, prediction, evaluation.

    python benchmarks/scaling.py --images data/raw/cifar10 --checkpoint runs/cifar10_adversarial

Whole commands. One process is held to one core and two to two: otherwise one process would read
images on the second core.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from robust_submission.cli.command import Names, run
from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier
from timing import (
    Words,
    make_folder,
    median,
    print_table,
    python,
    run_command,
    seconds_per_unit,
    times_as_fast,
)

FEW_STEPS = 2
COMMANDS = ("training", "adversarial", "prediction", "evaluation")
Plan = tuple[str, int, int, Callable[[bool], tuple[str, Words]]]
"""Title, units of the shorter run, additional units of the longer one, and the command of either:
script and arguments."""


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg."""
    checkpoint: Path | None = None
    """A run of CIFAR-10, which evaluation attacks."""
    commands: Names = Names(COMMANDS)
    """Among training, adversarial (training), prediction and evaluation."""
    rounds: int = 3
    """How often each is measured."""
    backbone: str = "convnext_atto"
    """The timm model of training."""
    backbone_args: str = '{"patch_size": 2}'
    """Its further arguments, JSON."""
    image_size: int = 32
    """Side of the training images and their JPEG files."""
    batch_size: int = 128
    """Images of a training step, shared by the processes."""
    steps: int = 40
    """Additional steps of the longer training."""
    predicted: int = 256
    """Additional images of the longer prediction; a multiple of 64 shares evenly."""
    evaluated: int = 2048
    """Additional images of the longer evaluation; a multiple of 256."""

    def __post_init__(self) -> None:
        if unknown := set(self.commands) - set(COMMANDS):
            raise UserError(f"--commands: expected {', '.join(COMMANDS)}, found {min(unknown)}.")
        if "evaluation" in self.commands and self.checkpoint is None:
            raise UserError("--checkpoint: expected a run for evaluation, found none.")


def training(options: Options, scratch: Path, objective: str = "standard") -> Plan:
    """An epoch of the backbone."""
    shorter, longer = (
        make_folder(
            options.images, scratch / str(steps), options.batch_size * steps, options.image_size
        )
        for steps in (FEW_STEPS, FEW_STEPS + options.steps)
    )
    arguments: Words = [
        *("--epochs=1", f"--batch_size={options.batch_size}", "--overwrite=true", "--trackers="),
        *("--data.name=folder", f"--model.image_size={options.image_size}"),
        f"--model.backbone={options.backbone}",
        f"--model.backbone_args={options.backbone_args}",
        *(f"--objective.name={objective}", "--objective.steps=10"),
        f"--output={scratch / 'run'}",
    ]
    attack = "" if objective == "standard" else ", PGD-10"
    title = f"training{attack}, {options.backbone}, {options.image_size} px; a step"
    return (
        f"{title} of {options.batch_size}",
        FEW_STEPS,
        options.steps,
        lambda long: (
            "training/train.py",
            [*arguments, f"--data.root={longer if long else shorter}"],
        ),
    )


def prediction(options: Options, scratch: Path) -> Plan:
    """ConvNeXt-Tiny with random weights at 224 pixels, on JPEG files of 256."""
    model, few = scratch / "model", 64
    images = make_folder(options.images, scratch / "jpeg", few + options.predicted, 256) / "train"
    RobustClassifier(class_names=[str(label) for label in range(10)]).save_pretrained(model)
    files: Words = ["--checkpoint", model, "--images", images, "--out", scratch / "sub.csv"]
    return (
        "prediction, ConvNeXt-Tiny, 224 px; an image",
        few,
        options.predicted,
        lambda long: (
            "inference/predict.py",
            [*files, f"--limit={few + options.predicted * long}"],
        ),
    )


def evaluation(options: Options, scratch: Path) -> Plan:
    """PGD-20 on the checkpoint, oblivious and adaptive, with noise and transfer."""
    assert options.checkpoint is not None
    few = 256
    arguments: Words = [
        *("--checkpoint", options.checkpoint, "--data.name=folder", "--data.root", options.images),
        *("--attacks=pgd", "--steps=20", "--curves=false", f"--out={scratch / 'report'}"),
    ]
    return (
        "evaluation, PGD-20; an image",
        few,
        options.evaluated,
        lambda long: (
            "inference/evaluate.py",
            [*arguments, f"--limit={few + options.evaluated * long}"],
        ),
    )


def measure(name: str, options: Options) -> list[str]:
    """The row of a command."""
    plan = {
        "training": training,
        "adversarial": partial(training, objective="adversarial"),
        "prediction": prediction,
        "evaluation": evaluation,
    }[name]

    def work(processes: int, long: bool) -> None:
        script, arguments = command(long)
        words = python(script, *arguments, processes=processes)
        run_command(words, threads=1, cores=processes)

    with tempfile.TemporaryDirectory() as folder:
        title, few, units, command = plan(options, Path(folder))
        pairs = {
            str(number): (partial(work, number, False), partial(work, number, True))
            for number in (1, 2)
        }
        seconds, _ = seconds_per_unit(pairs, few, units, options.rounds)
    one, two = (f"{median(seconds, number):.4f}" for number in ("1", "2"))
    return [title, one, two, times_as_fast(seconds, "2", "1")]


def compare(options: Options) -> None:
    """Measure the commands and print the table."""
    rows = [measure(name, options) for name in options.commands]
    columns = ("one thread per process", "1 process, s", "2 processes, s", "times as fast")
    print_table(columns, rows)


if __name__ == "__main__":
    run(compare, Options)
