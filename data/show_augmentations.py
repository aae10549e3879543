"""Show what each operation of the augmentations does to an image, on one sheet.

    python data/show_augmentations.py --image photo.jpg --out sheet.png --draws 3

The image comes first, then the 32 operations of `--data.augmentation challenge`, each applied for
certain; training applies each with probability 0.05. Then RandAugment's 15 operations at its mean
strength, TrivialAugment, and random erasing (`--data.policy`, `--data.erasing`).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, check_writable
from robust_submission.data.images import read_image, resize_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = 1.6
"""Side of one image on the sheet."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to show."""

    out: Path
    """The sheet, a PNG file."""
    image: Path | None = None
    """Any image file; by default a photograph that comes with scikit-learn."""
    image_size: int = 224
    """Side of the square image in pixels, as in training."""
    seed: int = 0
    """Of the draws."""
    draws: int = 1
    """How often each operation is drawn, side by side."""

    def __post_init__(self) -> None:
        for name, least in (("image_size", 8), ("seed", 0), ("draws", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"--{name}: expected at least {least}, received {value}.")


def draw_operations(image: np.ndarray, seed: int, draws: int) -> dict[str, np.ndarray]:
    """The results of each operation by its name, side by side.

    Args:
        image: uint8 (S, S, 3), RGB.
        seed: Of the draws.
        draws: How many of each.

    Returns:
        uint8 (S, draws * S, 3) a name.
    """
    from robust_submission.data.augment import apply_transform
    from robust_submission.data.challenge_operations import Drawn, challenge_operations
    from robust_submission.data.policies import (
        at_strength,
        erase,
        randaugment_levels,
        trivialaugment,
    )

    side = image.shape[0]
    levels = randaugment_levels(side)
    drawn = {f"rand {name}": at_strength(levels, name, 0.9) for name in levels}
    drawn |= {"trivialaugment": trivialaugment(side), "erasing": erase}
    operations = challenge_operations(side, p=1)
    operations |= {name: Drawn(function) for name, function in drawn.items()}
    return {
        name: np.hstack(
            [
                apply_transform(operation, image, np.random.default_rng([seed, index, draw]))
                for draw in range(draws)
            ]
        )
        for index, (name, operation) in enumerate(operations.items())
    }


def draw_sheet(pictures: dict[str, np.ndarray]) -> "Figure":
    """A grid of the pictures, all of one shape, under their names."""
    from matplotlib.figure import Figure

    height, width = next(iter(pictures.values())).shape[:2]
    columns = math.ceil(7 * height / width)
    rows = math.ceil(len(pictures) / columns)
    size = (columns * width / height * INCHES, rows * (INCHES + 0.25))
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.axis("off")
    for cell, (name, picture) in zip(cells, pictures.items(), strict=False):
        cell.imshow(picture, interpolation="nearest")
        cell.set_title(name, fontsize=8)
    return figure


def main(options: Options) -> None:
    """Write the sheet."""
    from sklearn.datasets import load_sample_image

    check_writable(options.out, options.image)
    found = read_image(options.image) if options.image else load_sample_image("china.jpg")
    image = resize_image(found, options.image_size)
    pictures = {"original": np.hstack([image] * options.draws)}
    pictures |= draw_operations(image, options.seed, options.draws)
    with atomic_write(options.out) as path:
        draw_sheet(pictures).savefig(path, format="png", dpi=150)
    print(f"{options.out}: {len(pictures) - 1} operations.")


if __name__ == "__main__":
    run(main, Options)
