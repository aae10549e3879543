"""Time and memory of the commands against the number of images.

    OMP_NUM_THREADS=1 python benchmarks/growth.py --counts 1000,10000,100000

Each row is one process, start-up included: predict.py and evaluate.py (FGSM, no curves) with a tiny
random ConvNeXt, and validate.py on the file that predict.py wrote. The images are PNG files of 8
pixels, hard links to scikit-learn's 360 test digits. Seconds per 1,000 images are the difference to
the row above. Memory is the process's largest resident set.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from robust_submission.cli.command import Names, run
from robust_submission.data.sources import open_source
from robust_submission.models.classifier import RobustClassifier
from timing import Usage, Words, print_table, python, run_command


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    counts: Names = Names("1000,10000,100000")
    """Growing numbers of images."""


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


def command_lines(model: Path, data: Path) -> dict[str, Words]:
    """The commands that are measured; predict writes the file that validate reads."""
    images, predictions = data / "test", data / "sub.csv"
    files = ("--checkpoint", model, "--images", images, "--out", predictions)
    return {
        "predict": python("inference/predict.py", *files),
        "evaluate": python(
            "inference/evaluate.py",
            *("--checkpoint", model, "--data.name", "folder", "--data.root", data),
            *("--limit", "null", "--attacks", "fgsm", "--curves", "false"),
            *("--out", data / "report"),
        ),
        "validate": python("submission/validate.py", predictions, "--images", images),
    }


def growth(options: Options) -> None:
    """Measure every command and print the table."""
    counts = [int(count) for count in options.counts]
    usages = dict[str, list[Usage]]()
    with tempfile.TemporaryDirectory() as name:
        folder, class_names = Path(name), [str(digit) for digit in range(10)]
        model = folder / "model"
        RobustClassifier(
            class_names=class_names, backbone="test_convnext", image_size=32
        ).save_pretrained(model)
        for count in counts:
            data = make_images(folder / str(count), count)
            for command, words in command_lines(model, data).items():
                usages.setdefault(command, []).append(run_command(words))
    rows = list[list[str]]()
    for command, found in usages.items():
        for place, (count, usage) in enumerate(zip(counts, found, strict=True)):
            slope = "-"
            if place:
                seconds = usage.seconds - found[place - 1].seconds
                slope = f"{1000 * seconds / (count - counts[place - 1]):.2f}"
            numbers = (f"{usage.seconds:.1f}", slope, f"{usage.peak:.0f}")
            rows.append([command, f"{count:,}", *numbers])
    print_table(("command", "images", "seconds", "s per 1,000 more", "peak MiB"), rows)


if __name__ == "__main__":
    run(growth, Options)
