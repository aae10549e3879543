"""Do time and memory grow straight and stay flat with the number of images?

    python benchmarks/growth.py --counts 1000,10000,100000

Each command on each number of images is one process, start-up included: predict.py and
evaluate.py (FGSM, all images, no curves) with a tiny random ConvNeXt, and validate.py on the file
that predict.py wrote. The images are 8-pixel PNG files in class folders, hard links to
scikit-learn's 360 test digits, so that the disk's cache holds them all. Seconds per 1,000 images
are between a row and the one above, without start-up: growth is straight when they stay the same.
Memory is the largest resident set of the process, and its ratio is to the command's first row.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from robust_submission.cli.command import Names, run
from robust_submission.data.sources import open_source
from robust_submission.models.classifier import RobustClassifier
from timing import Usage, print_machine, print_table, python, run_command

COMMANDS = ("predict", "evaluate", "validate")


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    counts: Names = Names("1000,10000,100000")
    """Numbers of images, parted by commas, growing."""
    commands: Names = Names(COMMANDS)
    """Among predict, evaluate and validate, which reads what predict wrote."""

    def __post_init__(self) -> None:
        if unknown := set(self.commands) - set(COMMANDS):
            raise ValueError(f"--commands: expected {', '.join(COMMANDS)}, found {min(unknown)}.")
        if "validate" in self.commands and "predict" not in self.commands:
            raise ValueError("--commands: expected predict with validate, found validate alone.")
        counts = [int(count) if count.isdecimal() else 0 for count in self.counts]
        if min(counts, default=0) < 1 or counts != sorted(set(counts)):
            raise ValueError(f"--counts: expected growing numbers, found {','.join(self.counts)}.")


def make_images(folder: Path, count: int) -> Path:
    """Write `count` PNG files folder/test/<class>/<index>.png, links to one of 360 digits each."""
    source = open_source("digits", split="test")
    assert source.labels is not None and source.class_names is not None
    classes = [folder / "test" / name for name in source.class_names]
    for path in classes:
        path.mkdir(parents=True)
    for index in range(count):
        place = index % len(source)
        digits = classes[source.labels[place]]
        if index < len(source):
            Image.fromarray(source.image(index)).save(digits / f"{index}.png")
        else:
            (digits / f"{index}.png").hardlink_to(digits / f"{place}.png")
    return folder


def make_model(folder: Path) -> Path:
    """Write a random classifier of the digits, 32 pixels a side."""
    class_names = open_source("digits", split="test").class_names
    assert class_names is not None
    model = RobustClassifier(class_names=class_names, backbone="test_convnext", image_size=32)
    model.save_pretrained(folder)
    return folder


def command_line(command: str, model: Path, data: Path) -> list[str | Path]:
    """The words that run `command` on `data`, in which they write too."""
    images, predictions = data / "test", data / "sub.csv"
    if command == "predict":
        return python(
            "inference/predict.py",
            *("--checkpoint", model, "--images", images, "--out", predictions),
        )
    if command == "validate":
        return python("submission/validate.py", predictions, "--images", images)
    return python(
        "inference/evaluate.py",
        *("--checkpoint", model, "--data.name", "folder", "--data.root", data),
        *("--limit", "null", "--attacks", "fgsm", "--norm", "linf", "--epsilon", "8/255"),
        *("--curves", "false", "--out", data / "report"),
    )


def growth_rows(command: str, counts: Sequence[int], usages: Sequence[Usage]) -> list[list[str]]:
    """The rows of a command: one a number of images."""
    rows = list[list[str]]()
    for place, (count, usage) in enumerate(zip(counts, usages, strict=True)):
        slope = "-"
        if place:
            seconds = usage.seconds - usages[place - 1].seconds
            slope = f"{1000 * seconds / (count - counts[place - 1]):.2f}"
        ratio = usage.peak / usages[0].peak
        numbers = (f"{usage.seconds:.1f}", f"{usage.peak:.0f}", slope, f"{ratio:.2f}")
        rows.append([command, f"{count:,}", *numbers])
    return rows


def growth(options: Options) -> None:
    """Measure every command and print the table."""
    counts = [int(count) for count in options.counts]
    usages = {name: list[Usage]() for name in sorted(options.commands, key=COMMANDS.index)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        for count in counts:
            data = make_images(folder / str(count), count)
            for command, found in usages.items():
                found.append(run_command(command_line(command, model, data)))
    rows = [row for command, found in usages.items() for row in growth_rows(command, counts, found)]
    columns = ("command", "images", "seconds", "peak MiB", "s per 1,000 more", "memory ratio")
    print_table(columns, rows)
    print_machine()


if __name__ == "__main__":
    run(growth, Options)
