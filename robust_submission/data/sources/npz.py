"""Images in an npz file, as generated ones are distributed: `image` and, if known, `label`.

`image` is uint8 (N, H, W, 3) in RGB, `label` (N,) integers. What `np.savez` wrote is mapped from
the file, so that it may be larger than memory; what `np.savez_compressed` wrote is loaded.
"""

import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np

from robust_submission.cli.errors import UserError, log_once
from robust_submission.data.sources.source import StoredSource

LARGEST_LABEL = 999_999  # as numbers in other files; each label up to the largest is a class
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What zipfile and numpy raise for files of another kind, damaged, or locked by a password.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, BadZipFile, zlib.error)


class _Member(NamedTuple):
    """An array in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None
    """Where its values are in the file; None if they are not there as in memory."""
    checksum: int
    """CRC-32, as the zip's directory has it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class NpzSource(StoredSource):
    """Images of one array in an npz file."""

    path: Path
    shape: tuple[int, ...]
    offset: int | None
    """Of the array in the file; None if it was loaded."""
    loaded: np.ndarray | None
    checksums: bytes

    def content(self, index: int) -> bytes:
        return self.image(index).tobytes()

    def place(self, index: int) -> str:
        return f"{self.path}: image {index}"

    def stamp(self, index: int) -> bytes:
        return self.checksums

    def image(self, index: int) -> np.ndarray:
        images = self.loaded
        if self.offset is not None:
            images = _map_images(self.path, self.offset, self.shape)
        assert images is not None
        return np.array(images[index])


@cache
def _map_images(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """The images in the file; not held by the source, as a worker would get a copy of them all."""
    return np.asarray(np.memmap(path, np.uint8, "r", offset, shape))


def _find_array(archive: ZipFile, path: Path, name: str) -> _Member:
    """Look an array up without reading its values."""
    member = f"{name}.npy"
    if member not in archive.namelist():
        found = ", ".join(archive.namelist()) or "nothing"
        raise UserError(f"{path}: expected an array {name}, found {found}.")
    info = archive.getinfo(member)
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise UserError(f"{path}: expected {name} in npy format 1 or 2, found {version[0]}.")
        shape, fortran, dtype = _HEADERS[version](file)
        header = file.tell()
    offset = None
    if info.compress_type == ZIP_STORED and not fortran:
        with path.open("rb") as file:  # the lengths there may differ from those in the directory
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")
        offset = info.header_offset + 30 + int(lengths.sum()) + header
    return _Member(name, shape, dtype, offset, info.CRC)


def _load(archive: ZipFile, member: _Member) -> np.ndarray:
    with archive.open(f"{member.name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _require(path: Path, member: _Member, fits: bool, expected: str) -> None:
    if not fits:
        found = f"{member.dtype} {member.shape}"
        raise UserError(f"{path}: expected {member.name} to be {expected}, found {found}.")


def open_npz(path: Path, split: str) -> NpzSource:
    """All images of an npz file, for train and for test; its classes are the numbers from 0 on.

    Raises:
        UserError: no such file, or one that is damaged; an array that is missing, or of another
            type or shape (one of objects would need pickle); a label below 0 or too large.
    """
    if split == "val":
        raise UserError(f"{path}: expected the split train or test, found 'val'.")
    if not path.is_file():
        raise UserError(f"{path}: expected an npz file, found nothing there.")
    try:
        with ZipFile(path) as archive:
            return _read_arrays(archive, path)
    except UserError:
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: expected a whole npz file, found: {reason}.") from error


def _read_arrays(archive: ZipFile, path: Path) -> NpzSource:
    image = _find_array(archive, path, "image")
    fits = len(image.shape) == 4 and image.shape[3] == 3 and min(image.shape) > 0
    _require(path, image, image.dtype == np.uint8 and fits, "uint8 (N, H, W, 3)")
    count = image.shape[0]
    labels, class_names, checksums = None, None, b"%08x" % image.checksum
    if "label.npy" in archive.namelist():
        label = _find_array(archive, path, "label")
        labels = _load_labels(archive, path, label, count)
        class_names = [str(each) for each in range(int(labels.max()) + 1)]
        checksums += b"%08x" % label.checksum
    loaded = None
    if image.offset is None:
        size = np.prod(image.shape, dtype=np.int64) / 1e6
        log_once(f"{path}: compressed, and therefore loaded: {size:,.1f} MB in each process.")
        loaded = _load(archive, image)
    else:
        _map_images(path, image.offset, image.shape)  # fails if the file is too short
    return NpzSource(
        ids=np.array([f"{index:05d}.png" for index in range(count)]),
        labels=labels,
        class_names=class_names,
        numbered=True,
        path=path,
        shape=image.shape,
        offset=image.offset,
        loaded=loaded,
        checksums=checksums,
    )


def _load_labels(archive: ZipFile, path: Path, label: _Member, count: int) -> np.ndarray:
    """int64 (count,), from 0 to `LARGEST_LABEL`."""
    integers = label.dtype.kind in "iu" and label.shape == (count,)
    _require(path, label, integers, f"integers ({count},), one of each image")
    labels = _load(archive, label).astype(np.int64)
    for extreme in (labels.min(), labels.max()):
        if not 0 <= extreme <= LARGEST_LABEL:
            expected = f"labels from 0 to {LARGEST_LABEL}"
            raise UserError(f"{path}: expected {expected}, found {extreme}.")
    return labels
