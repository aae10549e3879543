"""Does the memory of prediction grow with the number of images?

    python benchmarks/prediction_growth.py --images 1000,10000,100000

Predicts folders of 8-pixel PNG files (links to scikit-learn's 360 test digits) with a tiny random
ConvNeXt, one process each, and prints time and peak resident memory.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from cli.command import Names, run
from data.sources import open_source
from models.classifier import RobustClassifier

PREDICT = Path(__file__).parents[1] / "inference" / "predict.py"


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    images: Names = Names("1000,10000,100000")
    """Numbers of images, parted by commas."""


def make_images(folder: Path, count: int) -> None:
    """`count` PNG files, each a hard link to one of 360 digits."""
    source = open_source("digits", split="test")
    for index in range(count):
        first = folder / f"{index % len(source)}.png"
        if index < len(source):
            Image.fromarray(source.image(index)).save(first)
        else:
            (folder / f"{index}.png").hardlink_to(first)


def measure(checkpoint: Path, images: Path, out: Path) -> tuple[float, float]:
    """Seconds, and peak resident memory in MiB, of one prediction."""
    words = [sys.executable, str(PREDICT), "--checkpoint", str(checkpoint)]
    start = time.perf_counter()
    child = os.posix_spawn(
        sys.executable, [*words, "--images", str(images), "--out", str(out)], os.environ
    )
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def growth(options: Options) -> None:
    """Print one row a number of images; memory as a ratio to the first row's."""
    table = Table("images", "seconds", "peak MiB", "memory ratio")
    baseline = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classes = [str(digit) for digit in range(10)]
        model = RobustClassifier(class_names=classes, backbone="test_convnext", image_size=32)
        model.save_pretrained(folder / "model")
        for count in map(int, options.images):
            images = folder / str(count)
            images.mkdir()
            make_images(images, count)
            seconds, peak = measure(folder / "model", images, folder / "sub.csv")
            baseline = baseline or peak
            table.add_row(f"{count:,}", f"{seconds:.1f}", f"{peak:.0f}", f"{peak / baseline:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run(growth, Options)
