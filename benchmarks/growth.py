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
from timing import CLASSES, Usage, Words, print_table, python, run_command


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    counts: Names = Names("1000,10000,100000")
    """Growing numbers of images, each at least 360."""


def make_images(folder: Path, count: int) -> None:
    """Write `count` PNG files folder/test/<class>/<index>.png, links to one of 360 digits each."""
    source = open_source("digits", split="test")
    assert source.labels is not None
    for index in range(count):
        place = index % len(source)
        digits = folder / "test" / str(source.labels[place])
        if index < len(source):
            digits.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.image(index)).save(digits / f"{index}.png")
        else:
            (digits / f"{index}.png").hardlink_to(digits / f"{place}.png")


def command_lines(model: Path, data: Path) -> dict[str, Words]:
    """The commands that are measured; predict writes the file that validate reads."""
    images, predictions = data / "test", data / "sub.csv"
    evaluate = f"""
        inference/evaluate.py --checkpoint {model} --data.name folder --data.root {data}
        --out {data / "report"} --limit null --attacks fgsm --curves false
    """
    predict = f"--checkpoint {model} --images {images} --out {predictions}"
    return {
        "predict": python(f"inference/predict.py {predict}"),
        "evaluate": python(evaluate),
        "validate": python(f"submission/validate.py {predictions} --images {images}"),
    }


def growth(options: Options) -> None:
    """Measure every command and print the table."""
    counts = [int(count) for count in options.counts]
    usages = dict[str, list[Usage]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digits = [str(digit) for digit in range(CLASSES)]
        model = RobustClassifier(class_names=digits, backbone="test_convnext", image_size=32)
        model.save_pretrained(folder / "model")
        for count in counts:
            make_images(folder / str(count), count)
            for command, words in command_lines(folder / "model", folder / str(count)).items():
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
