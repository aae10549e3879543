"""What a data set is here: images by index, with their ids, labels and class names."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from robust_submission.cli.errors import UserError
from robust_submission.data.images import decode_image, read_bytes


class _RunData(BaseModel):
    """Where the images of a run are from."""

    name: str
    root: str | None
    image_column: str | None = None
    label_column: str | None = None


class RunRecord(BaseModel):
    """What is read again of a run's recipe."""

    model_config = ConfigDict(strict=True)
    data: _RunData
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    optimizer: dict[str, JsonValue] = {}
    objective: dict[str, JsonValue] = {}


class RunImages(BaseModel):
    """What is read again of a run's data.json."""

    held_out: dict[str, dict[str, str]] | None = None
    """See `stamps_by_class`; None where the data has a split val."""


class Source(Protocol):
    """Images by index, with what is known of them: all that datasets and loaders need.

    Attributes:
        ids: (N,) of str, unique: an image's name in a prediction file.
        labels: int64 (N,), or None where there are none.
        class_names: Names in label order, or None where there are no labels.
    """

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def labels(self) -> np.ndarray | None: ...

    @property
    def class_names(self) -> list[str] | None: ...

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
    numbered: bool = False
    """Ids are made of the images' places: another image there has the same."""
    left_out: Sequence[str] = ()
    """Samples of the data set that cannot be used and are not among the images, and why."""
    max_pixels: int | None = None
    """The largest image that is decoded; None for Pillow's own limit."""
    least_side: int | None = None
    """For training: JPEG files are decoded at 1/2, 1/4 or 1/8 of their size as long as no side gets
    below this; None for every pixel."""

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def content(self, index: int) -> bytes:
        """What is stored of image `index`, equal for equal images; UserError as in `image`."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Where image `index` is stored, for messages."""

    def stamp(self, index: int) -> bytes:
        """What changes with image `index` and costs little: its size, or all that is in memory."""
        return self.content(index)

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (H, W, 3), RGB; UserError where it cannot be read."""
        content, place = self.content(index), self.place(index)
        return decode_image(content, place, self.max_pixels, self.least_side)


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSource(StoredSource):
    """Image files in one folder and below; an image's id is its posix path in that folder."""

    folder: Path

    def content(self, index: int) -> bytes:
        return read_bytes(self.folder / str(self.ids[index]))

    def stamp(self, index: int) -> bytes:
        try:
            return b"%d" % os.stat(f"{self.folder}/{self.ids[index]}").st_size  # noqa: PTH116
        except OSError:  # reading it will say why
            return b""

    def place(self, index: int) -> str:
        return str(self.folder / str(self.ids[index]))


def _stratified(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` sorted indices, stratified where every class has two images or more, else drawn."""
    from sklearn.model_selection import train_test_split

    if not 0 <= seed < 2**32:
        raise UserError(f"seed: expected 0 to 2**32 - 1, found {seed}.")
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    even = counts.min() >= 2 and len(counts) <= min(size, len(labels) - size)
    stratify = labels if even else None
    _, chosen = train_test_split(
        np.arange(len(labels)), test_size=size, stratify=stratify, random_state=seed
    )
    return np.sort(chosen)


def stratified_subset(labels: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """Sorted indices of at most `limit` images with the classes' shares kept; None takes all.

    Raises:
        UserError: a limit below 1, or a seed below 0 or of more than 32 bits.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected at least 1 image, found {limit}.")
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    return _stratified(labels, limit, seed)


def split_train_validation(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a stratified share of the images for validation.

    At least as many images are held out as there are classes, which stratifying needs. A class of
    very few images may still be missing from them; the only image of a class stays in training.

    Args:
        labels: int64 (N,).
        fraction: The share held out, from 0 (none) to below 1.
        seed: The draw.

    Returns:
        Sorted indices to train on, and sorted indices to validate on.

    Raises:
        UserError: a fraction outside 0..1, nothing left to train or to validate on, or a seed
            below 0 or of more than 32 bits.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction: expected 0 to below 1, found {fraction}.")
    everything = np.arange(len(labels))
    if fraction == 0:
        return everything, everything[:0]
    splittable = np.flatnonzero(np.bincount(labels)[labels] >= 2)
    size = max(round(fraction * len(labels)), len(np.unique(labels[splittable])))
    if not 0 < size < len(splittable):
        expected = f"enough images to hold out {fraction:g} of them over all classes"
        found = f"{len(labels)} images of {len(np.unique(labels))} classes"
        raise UserError(f"data: expected {expected}, found {found}.")
    validation = splittable[_stratified(labels[splittable], size, seed)]
    return np.setdiff1d(everything, validation), validation
