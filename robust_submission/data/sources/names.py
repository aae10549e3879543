"""What people call their splits and classes, and what their systems leave beside the data."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from robust_submission.cli.errors import UserError, log_once

SPLITS = ("train", "val", "test")
LABEL = re.compile(r"[0-9]{1,6}")
"""A label written as a number."""
LITTER = {
    *("@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "__macosx", ".ds_store", "icon\r"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *(".ipynb_checkpoints", "__pycache__", ".git", "lost+found"),
}
LISTED = 20
"""Of the classes, in an error."""
NAMED = 5
"""Of what is left out, in a warning."""
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split that a name stands for, in lower case."""


def is_litter(name: str) -> bool:
    """Whether a system left a file or folder of this name, as Synology, macOS and Windows do."""
    return name.startswith("._") or name.lower() in LITTER


def name_splits(place: object, names: Iterable[str]) -> dict[str, str]:
    """Which of train, val and test are among the names, in any case, and what each is called.

    Raises:
        UserError: two names for one split.
    """
    called = dict[str, str]()
    for name in sorted(names):
        split = SPLIT_OF.get(name.lower())
        if split in called:
            raise UserError(f"{place}: expected one split {split}, found {called[split]}, {name}.")
        if split:
            called[split] = name
    if others := [f"{name} as {split}" for split, name in called.items() if name != split]:
        log_once(f"{place}: taken {', '.join(others)}.")
    return {split: called[split] for split in SPLITS if split in called}


def say_left_out(place: object, names: Sequence[str], why: str) -> None:
    """Warn, if there are any, of what is not read of a data set."""
    if names:
        some = "; ".join(names[:NAMED]) + ("; …" if len(names) > NAMED else "")
        log_once(f"{place}: {len(names)} left out, {why}: {some}.")


def order_classes(names: Iterable[str]) -> list[str]:
    """Class names in label order: as numbers when all are integers (0, 1, 10), else as strings."""
    ordered = sorted(names)
    if all(name.isascii() and name.isdigit() for name in ordered):
        return sorted(ordered, key=int)
    return ordered


def number_labels(words: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """The label of each word, and the class names in label order.

    Words that are all integers are the labels; others are class names, numbered in string order.
    """
    known = set(words)
    if all(LABEL.fullmatch(word) for word in known):
        labels = {word: int(word) for word in known}
        return labels, [str(label) for label in range(max(labels.values()) + 1)]
    classes = order_classes(known)
    return {name: label for label, name in enumerate(classes)}, classes


def _alike(name: str) -> str:
    """Equal for names that differ in case, or in how their letters are composed."""
    return unicodedata.normalize("NFC", name).casefold()


def only_numbers(names: Sequence[str]) -> bool:
    """Whether the names are the labels themselves: 0, 1, 2 and so on."""
    return list(names) == [str(label) for label in range(len(names))]


def shortened(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")


def match_classes(
    labels: np.ndarray, found: Sequence[str], known: Sequence[str], place: object
) -> tuple[np.ndarray, list[str]]:
    """The labels of some data as a model numbers its classes, and the names in that order.

    Names are compared but for case and order, and the data may lack some of the model's classes.
    Where the names of either are only numbers from 0 on, the labels are taken as they are.

    Args:
        labels: int64 (N,), of the data.
        found: The data's class names in label order; those without an image do not count.
        known: The model's.
        place: What to call the data.

    Raises:
        UserError: the data has a class that the model does not know.
    """
    if list(found) == list(known):
        return labels, list(known)
    present = [found[int(label)] for label in np.unique(labels)]
    numbers = {_alike(name): label for label, name in enumerate(known)}
    distinct = len({*map(_alike, present)}) == len(present) and len(numbers) == len(known)
    if distinct and all(_alike(name) in numbers for name in present):
        log_once(f"{place}: {len(present)} classes matched by name with the model's {len(known)}.")
        return np.array([numbers.get(_alike(name), -1) for name in found])[labels], list(known)
    fits = len(found) <= len(known) if only_numbers(found) else len(found) == len(known)
    if not fits or not (only_numbers(found) or only_numbers(known)):
        model, data = shortened(known), shortened(present)
        first = next((name for name in present if _alike(name) not in numbers), present[0])
        words = f"found {data}; it does not know {first} (see data.labels)"
        raise UserError(f"{place}: expected classes of the model ({model}), {words}.")
    log_once(f"{place}: labels taken as the model's numbers; one of the two has no class names.")
    return labels, list(found if only_numbers(known) else known)
