"""What a prediction file is: four profiles, and the layout that writer and validation share.

- `csv`: header `image_id,label`; image_id is the image's name.
- `json`: the challenge's Phase I, `[{"image_id": 7, "category_id": 0}, ...]`; image_id is the
  integer in the image's file name.
- `neurips`: `name,label` without a header (NeurIPS 2017 defence).
- `score`: header `image_name,score`; the score is the probability of one class (NTIRE 2026, robust
  detection of generated images).

Labels are integers from 0, in the order of the class names, or the class names themselves. A
template, a contest's sample_submission.csv, decides header, ids, row order, and which of the two
they are. Probabilities have six decimals, so that a row sums to 1 only up to rounding: in a CSV one
column `p_<class name>` per class, in JSON a list under "probabilities". A score, which is there to
rank images, has nine.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from robust_submission.cli.errors import UserError

Format = Literal["csv", "json", "neurips", "score"]
Labels = Literal["names", "indices"]
HEADER = ("image_id", "label")
SCORE_HEADER = ("image_name", "score")
JSON_KEYS = ("image_id", "category_id", "probabilities")
LABEL_COLUMN = -1  # stands for the label among the columns of class probabilities
_ENDINGS: dict[str, Format] = {".csv": "csv", ".json": "json"}
_INTEGER_NAME = re.compile(r"(?:.*/)?([0-9]+)(?:\.[^./]*)?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a row says of its image, where the format and a template leave it open."""

    probabilities: bool = False
    """Also one column per class."""
    labels: Labels | None = None
    """How labels are written; None: as the template has them, without one as indices."""
    score_class: str | None = None
    """The class whose probability is the score, by name or index; None: the one that a template's
    column is called after, else of two the second."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Header, rows and columns of a prediction file, as far as they are known before it is read."""

    format: Format
    header: Sequence[str] | None = None
    ids: Mapping[str | int, str] = field(default_factory=dict)
    """Each row's id as written, and the name of its image; in the order of the rows. Empty where
    the images are unknown."""
    columns: Sequence[int] = (LABEL_COLUMN,)
    """What follows the id: `LABEL_COLUMN`, or the class whose probability it is."""
    label_names: Sequence[str] = ()
    """Class names where the labels are written as names; empty for integers."""
    from_template: bool = False
    labels: Labels | None = None
    """Of a file to be validated, by choice; None: as a template has them, without one as most rows
    have them."""
    class_names: Sequence[str] = ()
    """What a file to be validated has, in label order; empty where unknown."""
    num_classes: int | None = None
    """The same."""

    @property
    def is_score(self) -> bool:
        """Whether a row holds the probability of one class and nothing else."""
        return len(self.columns) == 1 and self.columns[0] != LABEL_COLUMN

    @property
    def needs_probabilities(self) -> bool:
        return any(column != LABEL_COLUMN for column in self.columns)

    @property
    def digits(self) -> int:
        """Decimals of a probability: scores, which rank images, have more."""
        return 9 if self.is_score else 6

    def describe(self, class_names: Sequence[str]) -> str:
        """What a row says of its image, in words."""
        if self.is_score:
            return f"score: the probability of {class_names[self.columns[0]]!r}"
        if LABEL_COLUMN not in self.columns:
            return "probabilities without labels"
        return "labels: " + (
            "class names" if self.label_names else f"indices, 0 is {class_names[0]!r}"
        )


def choose_format(path: Path, format: Format | None = None) -> Format:
    """The profile: `format` where given, else by the ending of `path`.

    Raises:
        UserError: an ending that names no profile.
    """
    if choice := format or _ENDINGS.get(path.suffix.lower()):
        return choice
    found = path.suffix or "no ending"
    raise UserError(f"{path}: expected the ending .csv or .json, or --format, found {found}.")


def column_order(columns: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """The class of each probability column, or None where the columns are not the classes.

    The column of a class is called by its name or its number, either with or without `p_`.
    """
    numbers = [str(label) for label in range(len(class_names))]
    for names in (class_names, numbers):
        for prefix in ("p_", ""):
            labels = {f"{prefix}{name}": label for label, name in enumerate(names)}
            if labels.keys() == set(columns) and len(columns) == len(labels):
                return [labels[column] for column in columns]
    return None


def column_class(column: str, class_names: Sequence[str]) -> int | None:
    """The class that a column alone is called after, or None.

    By its name, in any case and with or without `p_`, or by its number with `p_`.
    """
    bare = column.removeprefix("p_")
    for spell in (str, str.casefold):
        names = [*map(spell, class_names)]
        for called in (spell(column), spell(bare)):
            if names.count(called) == 1:
                return names.index(called)
    numbers = [f"p_{label}" for label in range(len(class_names))]
    return numbers.index(column) if column in numbers else None


def find_class(class_names: Sequence[str], choice: str | None, option: str) -> int:
    """The label of a class that an option gives by name or, where none has it, by index.

    Raises:
        UserError: no such class.
    """
    if choice in class_names:
        return class_names.index(choice)
    if choice is not None and choice.isdecimal() and int(choice) < len(class_names):
        return int(choice)
    found, listed = choice or "none", ", ".join(class_names)
    expected = f"one of the classes ({listed[:200]}) or an index from 0"
    raise UserError(f"{option}: expected {expected}, found {found}.")


def integer_ids(images: Sequence[str]) -> dict[str, int]:
    """The integer in each file name, which the JSON profile writes: `test/17.png` -> 17.

    Raises:
        UserError: a name that is no integer, or two names with one integer.
    """
    names = dict[int, str]()
    for name in images:
        stem = _INTEGER_NAME.fullmatch(name)
        if not stem:
            raise UserError(f"{name!r}: expected an integer file name for JSON, such as 17.png.")
        if (other := names.setdefault(int(stem[1]), name)) != name:
            raise UserError(f"{name!r}: expected one image {int(stem[1])}, found also {other!r}.")
    return {name: number for number, name in names.items()}
