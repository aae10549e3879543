"""What is evaluated, and how: the settings that commands and `evaluate` of the package share.

Importing this file takes no time: commands read it before they know what they are asked.
"""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, get_args

from robust_submission.cli.errors import UserError
from robust_submission.cli.numbers import radius

NormName = Literal["linf", "l2", "l1", "l1-dense"]


@dataclass(kw_only=True)
class StoredData:
    """Where the images of a data set are, and what of them is read."""

    root: Path | None = None
    """Folder (or manifest) of the data, or its name on the Hugging Face Hub; not needed for
    digits."""
    download: bool = False
    """Let torchvision download the data set if it is not in root."""
    image_column: str | None = None
    """hf: the column of the images; by default the one of type Image."""
    label_column: str | None = None
    """hf: the column of the labels; by default the one of type ClassLabel."""
    max_pixels: int | None = None
    """The most pixels of an image that is read; by default Pillow's limit, 89,478,485."""


@dataclass(kw_only=True)
class DataOptions(StoredData):
    """The images."""

    name: str | None = None
    """digits, cifar10, svhn, fashion_mnist, folder, hf, challenge, csv, npz, cifar10c or imagenetc
    (see data/README.md); by default the run's own."""
    split: str = "test"
    """train, val or test; of cifar10c and imagenetc a kind and a severity, such as fog/3."""
    labels: Literal["names", "indices"] = "names"
    """names: match the classes with the model's by name, if both have names; indices: take the
    labels as the model's, whatever the classes are called."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How to attack: everything but the model and the images that decides the results."""

    attacks: tuple[str, ...] = ("fgsm", "pgd", "autoattack")
    """fgsm, ffgsm, bim, mim, pgd, cw (L2), fmn (Linf, L1), ddn (L2), autoattack or one of its
    parts: apgd-ce, apgd-t, apgd-dlr, fab, fab-t, square; screen (Linf, L2), its fast stand-in on
    honest models. Noise and a transfer attack are added."""
    norm: NormName = "linf"
    """The norm that epsilon bounds; l1-dense: L1 with steps that change every pixel."""
    epsilon: tuple[float, ...] = (8 / 255,)
    """Radii in pixel values from 0 to 1; the headline numbers are for the first."""
    steps: int = 20
    """Steps of bim, mim and pgd."""
    draws: int = 5
    """Draws of a random model that are scored."""
    eot: int = 10
    """Draws of a random model that an adaptive attack averages over, at most; other ones than are
    scored."""
    curves: bool = True
    """Also measure accuracy against epsilon and against steps, for the checks that need them."""
    corruptions: tuple[str, ...] = ()
    """Also measure accuracy on corrupted images: all, or kinds such as gaussian_noise and fog, each
    at severities 1 to 5."""
    seed: int = 0
    """Seed of every random draw."""

    def __post_init__(self) -> None:
        for name in ("steps", "draws", "eot"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name}: expected at least 1, found {value}.")
        if self.norm not in (norms := get_args(NormName)):
            raise UserError(f"norm: expected {', '.join(norms)}, found {self.norm}.")
        if self.corruptions:
            from robust_submission.data.corruptions import corruption_names  # imports torch

            corruption_names(self.corruptions)
        if self.seed < 0:
            raise UserError(f"seed: expected at least 0, found {self.seed}.")
        if not self.attacks or not self.epsilon:
            raise UserError("attacks, epsilon: expected at least one of each, found none.")
        largest = 1 if self.norm == "linf" else inf
        if not all(0 < each <= largest for each in self.epsilon):  # also for NaN
            raise UserError(
                "epsilon: expected radii above 0, for linf at most 1, as pixels are 0 to 1 "
                f"(8/255), found {', '.join(f'{each:g}' for each in self.epsilon)}."
            )
        names = [radius(each, self.norm) for each in set(self.epsilon)]
        if len(set(names)) < len(names):
            raise UserError(
                "epsilon: expected radii that differ in the digits that name them "
                f"({max(names, key=names.count)}), found {', '.join(map(str, self.epsilon))}."
            )
