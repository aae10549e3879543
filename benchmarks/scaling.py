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
    CLASSES,
    CommandOptions,
    make_folder,
    median,
    print_table,
    python,
    run_command,
    seconds_per_unit,
    times_as_fast,
)


@dataclass(kw_only=True)
class Options(CommandOptions):
    """What to measure."""

    checkpoint: Path | None = None
    """A run of CIFAR-10, which evaluation attacks."""
    commands: Names = Names("training,adversarial,prediction,evaluation")
    """Among training, adversarial (training), prediction and evaluation."""
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

    def __post_init__(self) -> None:
        if unknown := set(self.commands) - set(COMMANDS):
            raise UserError(f"--commands: expected {', '.join(COMMANDS)}, found {min(unknown)}.")
        if "evaluation" in self.commands and self.checkpoint is None:
            raise UserError("--checkpoint: expected a run for evaluation, found none.")


Plan = tuple[str, int, int, Callable[[int], list[str]]]
"""Title, units of the shorter run, additional units of the longer one, and the command line of so
many units: a script and its options."""


def training(options: Options, scratch: Path, objective: str) -> Plan:
    """An epoch of the backbone."""
    size, batch_size = options.image_size, options.batch_size
    images = make_folder(options.images, scratch / "jpeg", (2 + options.steps) * batch_size, size)
    script = f"""
        training/train.py --epochs 1 --batch_size {batch_size} --overwrite true
        --output {scratch / "run"} --data.name folder --data.root {images} --model.image_size {size}
        --model.backbone {options.backbone} --objective.name {objective} --objective.steps 10
    """
    words = [script, "--trackers=", "--model.backbone_args", options.backbone_args, "--data.limit"]
    attack = ", PGD-10" if objective == "adversarial" else ""
    title = f"training{attack}, {options.backbone}, {size} px; a step of {batch_size}"
    return title, 2, options.steps, lambda steps: [*words, str(steps * batch_size)]


def prediction(options: Options, scratch: Path) -> Plan:
    """ConvNeXt-Tiny with random weights at 224 pixels, on JPEG files of 256."""
    few, more, model = 64, 256, scratch / "model"
    images = make_folder(options.images, scratch / "jpeg", few + more, 256) / "train"
    RobustClassifier(class_names=[str(each) for each in range(CLASSES)]).save_pretrained(model)
    files = f"--checkpoint {model} --images {images} --out {scratch / 'sub.csv'}"
    script = f"inference/predict.py {files} --limit"
    return "prediction, ConvNeXt-Tiny, 224 px; an image", few, more, lambda n: [f"{script} {n}"]


def evaluation(options: Options, scratch: Path) -> Plan:
    """PGD-20 on the checkpoint, oblivious and adaptive, with noise and transfer."""
    script = f"""
        inference/evaluate.py --checkpoint {options.checkpoint} --data.name folder
        --data.root {options.images} --out {scratch / "report"} --attacks pgd --steps 20
        --curves false --limit
    """
    return "evaluation, PGD-20; an image", 256, 2048, lambda n: [f"{script} {n}"]


COMMANDS = {
    "training": partial(training, objective="standard"),
    "adversarial": partial(training, objective="adversarial"),
    "prediction": prediction,
    "evaluation": evaluation,
}


def measure(name: str, options: Options) -> list[str]:
    """The row of a command."""
    with tempfile.TemporaryDirectory() as scratch:
        title, few, more, words = COMMANDS[name](options, Path(scratch))

        def work(processes: int, units: int) -> None:
            command = python(*words(units), processes=processes)
            run_command(command, threads=1, cores=processes)

        works = {str(number): partial(work, number) for number in (1, 2)}
        seconds, _ = seconds_per_unit(works, few, more, options.rounds)
    one, two = (f"{median(seconds, number):.4f}" for number in ("1", "2"))
    return [title, one, two, times_as_fast(seconds, "2", "1")]


def compare(options: Options) -> None:
    """Measure the commands and print the table."""
    rows = [measure(name, options) for name in options.commands]
    columns = ("one thread per process", "1 process, s", "2 processes, s", "times as fast")
    print_table(columns, rows)


if __name__ == "__main__":
    run(compare, Options)
