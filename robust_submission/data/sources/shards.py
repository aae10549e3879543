"""Datasets in WebDataset shards: tar files in which 0001.jpg and 0001.cls are one sample.

The headers are read once; an image is then read by its place in its shard, like a file of its own.
Order, workers, processes and resuming are therefore those of every other source: nothing is
unpacked, and nothing is shuffled in a buffer.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.images import SUFFIXES, decode_image, read_bytes
from robust_submission.data.sources.folders import SPLITS
from robust_submission.data.sources.listing import natural_order, require_folder
from robust_submission.data.sources.manifests import read_text

MAX_CLASSES = 1_000_000
# As in webdataset: the key is the path up to the first dot of the file's name.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, eq=False)
class ShardSource:
    """Images inside tar files; an image's id is its member's name."""

    shards: list[Path]
    places: np.ndarray
    """int64 (N, 3): each image's shard, and its offset and size there in bytes."""
    ids: np.ndarray
    labels: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (H, W, 3), RGB; ValueError when it cannot be read.

        The shard is opened for each image: there is no handle that forked workers would share,
        that spawned ones could not take along, or that thousands of shards would exhaust.
        """
        shard, offset, size = self.places[index].tolist()
        path = self.shards[shard]
        return decode_image(read_bytes(path, offset, size), f"{path}: {self.ids[index]}")


class _Member(NamedTuple):
    name: str
    offset: int  # in bytes, as the size
    size: int


_Sample = dict[str, _Member]  # the members of one key, by their endings in lower case


def _list_shards(folder: Path) -> list[Path]:
    names = [path.name for path in folder.glob("*.tar") if path.name[0] != "."]
    return [folder / name for name in natural_order(names)]


def shard_splits(root: Path) -> tuple[str, ...]:
    """Those of train, val and test that are folders of shards in `root`."""
    require_folder(root, "a folder of shards")
    return tuple(split for split in SPLITS if _list_shards(root / split))


def _list_members(path: Path, file: BufferedReader) -> Iterator[_Member]:
    """The plain files of a tar, in the order in which they stand."""
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="strict") as tar:
            while member := tar.next():
                if member.size < 0:  # by which an older tarfile would go back, for ever
                    raise tarfile.ReadError("a negative size")
                if member.isreg():
                    yield _Member(member.name, member.offset_data, member.size)
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or it keeps all
            # tarfile takes a damaged or missing header for the end, which is a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a member nor the end at byte {tar.offset}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        file.seek(0)
        packed = [name for magic, name in _COMPRESSED.items() if file.peek().startswith(magic)]
        found = f"{packed[0]} data" if packed else f"it truncated or damaged ({error})"
        raise UserError(f"{path}: expected a whole, uncompressed tar, found {found}.") from error


def _read_samples(path: Path, file: BufferedReader) -> dict[str, _Sample]:
    """The members of each key, in the order of the keys' first members."""
    samples = dict[str, _Sample]()
    for member in _list_members(path, file):
        if not (parts := _NAME.fullmatch(member.name)):
            continue
        sample, ending = samples.setdefault(parts[1], {}), parts[2].lower()
        if ending in sample:
            raise UserError(f"{path}: expected each member once, found {member.name!r} again.")
        sample[ending] = member
    return samples


def _read_label(path: Path, file: BufferedReader, sample: _Sample) -> int:
    """The integer in KEY.cls, else that under "label" in KEY.json."""
    member = sample.get("cls") or sample.get("json")
    if member is None:
        found = ", ".join(each.name for each in sample.values())
        raise UserError(f"{path}: expected a label (.cls or .json) with {found}, found none.")
    file.seek(member.offset)
    content = file.read(member.size)
    try:
        label = int(content) if "cls" in sample else json.loads(content)["label"]
    except (ValueError, LookupError, TypeError, RecursionError):
        label = None
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        found = f"found {content[:80]!r}"
        raise UserError(f"{path}: {member.name}: expected an integer label from 0 on, {found}.")
    return label


def _index_samples(path: Path, file: BufferedReader) -> Iterator[tuple[_Member, int]]:
    """The image and the label of each sample; keys that have neither are passed over."""
    for key, sample in _read_samples(path, file).items():
        images = [member for ending, member in sample.items() if f".{ending}" in SUFFIXES]
        if len(images) > 1 or (not images and "cls" in sample):
            found = ", ".join(image.name for image in images) or "none"
            raise UserError(f"{path}: expected one image of the key {key!r}, found {found}.")
        if images:
            yield images[0], _read_label(path, file, sample)


def _index_shard(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids (n,), offsets and sizes (n, 2) and labels (n,) of a shard's images."""
    try:
        with path.open("rb") as file:
            rows = list(_index_samples(path, file))
    except OSError as error:
        raise UserError(f"{path}: expected a readable tar, found: {error.strerror}.") from error
    if not rows:
        raise UserError(f"{path}: expected images (KEY.jpg, KEY.png …), found none.")
    ids = np.array([image.name for image, _ in rows])
    places = np.array([(image.offset, image.size) for image, _ in rows], dtype=np.int64)
    return ids, places, np.array([label for _, label in rows], dtype=np.int64)


def _index(folder: Path) -> ShardSource:
    """All shards of a folder; its class names are not known yet."""
    shards = _list_shards(folder)
    if not shards:
        raise UserError(f"{folder}: expected shards (*.tar, not compressed), found none.")
    ids, places, labels = zip(*map(_index_shard, shards), strict=True)
    numbers = np.repeat(np.arange(len(shards)), [len(part) for part in ids])
    places = np.column_stack([numbers, np.concatenate(places)])
    source = ShardSource(shards, places, np.concatenate(ids), np.concatenate(labels), [])
    order = np.argsort(source.ids, kind="stable")
    if len(twice := np.flatnonzero(source.ids[order[1:]] == source.ids[order[:-1]])):
        first, again = (shards[numbers[order[twice[0] + step]]] for step in (0, 1))
        found = f"{str(source.ids[order[twice[0]]])!r} again (first in {first.name})"
        raise UserError(f"{again}: expected each key once, found {found}.")
    return source


def _read_classes(path: Path, source: ShardSource) -> list[str]:
    """The names in classes.txt, checked against the labels."""
    names = [line.strip() for line in read_text(path, "a class name a line").splitlines()]
    if "" in names or len(set(names)) < len(names):
        found = "an empty line" if "" in names else "a name twice"
        raise UserError(f"{path}: expected another class name in each line, found {found}.")
    last = source.labels.argmax()
    if source.labels[last] >= len(names):
        raise UserError(
            f"{source.shards[source.places[last, 0]]}: {source.ids[last]}: expected a label of the "
            f"{len(names)} in {path}, found {source.labels[last]}."
        )
    return names


def open_shards(root: Path, split: str) -> ShardSource:
    """WebDataset shards: root/<split>/*.tar, or root/*.tar where root has no split folders.

    A sample is an image and its label, an integer in KEY.cls or under "label" in KEY.json. Class
    names stand in root/classes.txt, one a line; without it they are the numbers up to the largest
    label of all splits, whose headers must be read for that. The order is that of the shards'
    names (2.tar before 10.tar) and of the samples within.

    Raises:
        UserError: no such folder, split or shards; a shard that is compressed, truncated or
            without images; a sample without label or with several images; a key that comes twice;
            a label that is no integer from 0 on, or beyond classes.txt.
    """
    splits = shard_splits(root)
    if split not in (splits or ("train", "test")):
        found = f"only {', '.join(splits)}" if splits else "shards without splits"
        raise UserError(f"{root}: expected the folder {split} of shards, found {found}.")
    source = _index(root / split if splits else root)
    if (root / "classes.txt").exists():
        return replace(source, class_names=_read_classes(root / "classes.txt", source))
    others = [_index(root / other).labels for other in splits if other != split]
    largest = np.concatenate([source.labels, *others]).max()
    return replace(source, class_names=[str(label) for label in range(largest + 1)])
