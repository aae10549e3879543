"""Check a data set before a run reads it: splits, classes, sizes, and the images to mend.

    python data/check.py --data.name folder --data.root DIR

Reads every image once. Exit status 1 where something must be mended first: an image that cannot be
read, an image that is in train and in test, or fewer than two classes. data/README.md shows the
layouts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.data.inspection import Inspection, inspect_data
from robust_submission.data.sources import Columns
from robust_submission.settings import StoredData


@dataclass(kw_only=True)
class CheckedData(StoredData):
    """The data set."""

    name: str
    """digits, cifar10, svhn, fashion_mnist, folder, hf, challenge, csv, npz, cifar10c, imagenetc
    or images."""


@dataclass(kw_only=True)
class Options:
    """What to check."""

    data: CheckedData
    """The data set."""
    num_workers: int = os.cpu_count() or 1
    """Processes that read images."""
    show: int = 10
    """How many lines to print of each list."""

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 1), ("show", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: expected at least {least}, found {getattr(self, name)}.")


def draw_splits(inspection: Inspection) -> Table:
    """Images and sizes of each split."""
    table = Table("split", "images", "smallest", "largest", "unreadable")
    for split, images in inspection.images.items():
        sizes = sorted(inspection.sizes(split), key=lambda size: size[0] * size[1])
        ends = [f"{width} x {height}" for width, height in (*sizes[:1], *sizes[-1:])] or ["", ""]
        faults = sum(bool(image.fault) for image in images)
        table.add_row(split, f"{len(images):,}", *ends, f"{faults:,}")
    return table


def draw_classes(inspection: Inspection) -> Table:
    """Images of each class in each split."""
    counts = {split: inspection.class_counts(split) for split in inspection.splits}
    table = Table("label", "class", *counts)
    names = dict.fromkeys(name for count in counts.values() for name in count)
    for label, name in enumerate(names):
        cells = (f"{count.get(name, 0):,}" for count in counts.values())
        table.add_row(str(label), Text(name), *cells)  # not as rich's markup
    return table


def print_list(title: str, lines: Sequence[str], show: int) -> None:
    """The first lines of a list under its title; nothing where it is empty."""
    if lines:
        print(f"{title}: {len(lines):,}")
        for line in lines[:show]:
            print(f"  {line}")
        if len(lines) > show:
            print(f"  and {len(lines) - show:,} more; see --show.")


def main(options: Options) -> None:
    """Inspect the data set and print what was found.

    Raises:
        UserError: it cannot be opened, or must be mended.
    """
    data = options.data
    inspection = inspect_data(
        data.name,
        data.root,
        workers=options.num_workers,
        download=data.download,
        columns=Columns(image=data.image_column, label=data.label_column),
        max_pixels=data.max_pixels,
    )
    console = Console()
    console.print(draw_splits(inspection))
    if inspection.class_counts(next(iter(inspection.splits))):
        console.print(draw_classes(inspection))
    print_list("left out", inspection.left_out(), options.show)
    print_list("unreadable", inspection.unreadable(), options.show)
    groups = [
        " = ".join(inspection.place(split, index) for split, index in group)
        for group in inspection.repeated()
    ]
    print_list("same bytes", groups, options.show)
    if faults := inspection.faults():
        found = "; ".join(faults)
        place = data.root or data.name
        raise UserError(f"{place}: expected data that a run can use, found {found}.")
    print("Nothing must be mended.")


if __name__ == "__main__":
    run(main, Options)
