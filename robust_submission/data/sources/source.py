"""What a data set is here: images by index, with their ids, labels and class names."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from robust_submission.data.images import decode_image, read_bytes

SPLITS = ("train", "val", "test")
LABEL = re.compile(r"[0-9]{1,6}")
"""A label written as a number."""


class Source(Protocol):
    """Images by index, with what is known of them: all that datasets and loaders need."""

    @property
    def ids(self) -> np.ndarray:
        """(N,) of str, unique: an image's name in a prediction file."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (N,), or None where there are none."""
        ...

    @property
    def class_names(self) -> list[str] | None:
        """Names in label order, or None where there are no labels."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (H, W, 3), RGB; UserError where it cannot be read."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredSource(ABC):
    """The `Source` that `open_source` gives: its images are stored as files, or as arrays.

    Ids are one numpy array, which worker processes share; a list would be copied by them, string by
    string, as they count references.
    """

    ids: np.ndarray
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    left_out: Sequence[str] = ()
    """Samples of the data set that cannot be used and are not among the images, and why."""

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def content(self, index: int) -> bytes:
        """What is stored of image `index`: equal bytes, equal images.

        Raises:
            UserError: it cannot be read.
        """

    @abstractmethod
    def place(self, index: int) -> str:
        """Where image `index` is stored, for messages."""

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (H, W, 3), RGB.

        Raises:
            UserError: it cannot be read.
        """
        return decode_image(self.content(index), self.place(index))


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSource(StoredSource):
    """Image files in one folder and below; an image's id is its posix path in that folder."""

    folder: Path

    def content(self, index: int) -> bytes:
        """The bytes of the file."""
        return read_bytes(self.folder / str(self.ids[index]))

    def place(self, index: int) -> str:
        """The path of the file."""
        return str(self.folder / str(self.ids[index]))


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
