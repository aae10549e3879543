"""Inspects a data set before a run reads it: classes, sizes, unreadable and repeated images.

inspection = inspect_data("folder", Path("data/raw/photos"), workers=4)
inspection.faults()  # what must be mended
"""

import signal
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from robust_submission.cli.errors import UserError
from robust_submission.data.images import is_image
from robust_submission.data.sources import Columns, StoredSource, available_splits, open_source
from robust_submission.data.sources.folders import list_files
from robust_submission.data.sources.huggingface import table_files
from robust_submission.data.sources.source import FileSource

CHUNK = 32
"""Images that a worker process inspects at a time; the progress bar moves after each chunk."""

_in_worker = list[StoredSource]()


class InspectedImage(NamedTuple):
    """What was found out about one image."""

    digest: bytes
    """Of its stored bytes; empty where it cannot be read."""
    size: tuple[int, int]
    """Width and height in pixels."""
    fault: str
    """Why it cannot be read; empty where it can."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a run would read, and what is wrong with it."""

    splits: Mapping[str, StoredSource]
    images: Mapping[str, Sequence[InspectedImage]]
    """By split, in the order of its images."""
    unread: Sequence[str]
    """Files in the folder that no split reads, and why."""

    def class_counts(self, split: str) -> dict[str, int]:
        """Images of each class in label order; empty where there are no labels."""
        source = self.splits[split]
        if source.labels is None or source.class_names is None:
            return {}
        counts = np.bincount(source.labels, minlength=len(source.class_names)).tolist()
        return dict(zip(source.class_names, counts, strict=True))

    def sizes(self, split: str) -> Counter[tuple[int, int]]:
        """How many images have each width and height."""
        return Counter(image.size for image in self.images[split] if not image.fault)

    def left_out(self) -> list[str]:
        """Samples and files that no split reads, and why."""
        splits = self.splits.items()
        samples = [f"{split}: {each}" for split, source in splits for each in source.left_out]
        return [*samples, *self.unread]

    def unreadable(self) -> list[str]:
        """One message per image that cannot be read."""
        return [image.fault for images in self.images.values() for image in images if image.fault]

    def repeated(self) -> list[list[tuple[str, int]]]:
        """Groups of images with the same bytes, each as (split, index)."""
        groups = defaultdict[bytes, list[tuple[str, int]]](list)
        for split, images in self.images.items():
            for index, image in enumerate(images):
                if not image.fault:
                    groups[image.digest].append((split, index))
        return [group for group in groups.values() if len(group) > 1]

    def leaked(self) -> list[list[tuple[str, int]]]:
        """The groups of `repeated` that are in train and in test."""
        both = {"train", "test"}
        return [group for group in self.repeated() if both <= {split for split, _ in group}]

    def place(self, split: str, index: int) -> str:
        """Where an image is stored, for messages."""
        return f"{split}: {self.splits[split].place(index)}"

    def faults(self) -> list[str]:
        """What must be mended before a run, in words; empty where nothing must."""
        found = list[str]()
        if count := len(self.unreadable()):
            found.append(f"unreadable images: {count}")
        if count := len(self.leaked()):
            found.append(f"images in both train and test: {count}")
        counts = self.class_counts(next(iter(self.splits)))
        if counts and (number := sum(count > 0 for count in counts.values())) < 2:
            found.append(f"classes with images: {number}")
        return found


def _keep_in_worker(source: StoredSource) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _in_worker[:] = [source]


def _inspect_image(source: StoredSource, index: int) -> InspectedImage:
    try:
        image = source.image(index)
        digest = blake2b(source.content(index), digest_size=16).digest()
    except UserError as error:
        return InspectedImage(b"", (0, 0), str(error))
    return InspectedImage(digest, (image.shape[1], image.shape[0]), "")


def _inspect_chunk(indices: list[int]) -> list[InspectedImage]:
    return [_inspect_image(_in_worker[0], index) for index in indices]


def inspect_images(
    source: StoredSource, indices: np.ndarray, workers: int, name: str, *, hidden: bool = False
) -> list[InspectedImage]:
    """Read images of a source once, in `workers` processes, with a progress bar unless `hidden`."""
    chunks = [indices[start : start + CHUNK].tolist() for start in range(0, len(indices), CHUNK)]
    images = list[InspectedImage]()
    with (
        tqdm(total=len(indices), desc=name, unit="image", disable=hidden) as bar,
        ProcessPoolExecutor(workers, initializer=_keep_in_worker, initargs=(source,)) as pool,
    ):
        for found in pool.map(_inspect_chunk, chunks):
            images += found
            bar.update(len(found))
    return images


def _unread_files(name: str, root: Path | None, splits: Mapping[str, StoredSource]) -> list[str]:
    """Files in the data set's folder that no split reads, and why."""
    if root is None or not root.exists():
        return []
    manifest = root.parent if root.is_file() else root
    folder = {"csv": manifest, "challenge": root / "images"}.get(name, root)
    if name == "hf":
        read = table_files(str(root))
    else:
        files = [source for source in splits.values() if isinstance(source, FileSource)]
        read = {str(source.folder / str(each)) for source in files for each in source.ids}
    if not read:  # it is in memory, or was saved by `datasets`
        return []
    read |= {str(root), *(str(each) for each in root.rglob("labels.csv") if name == "csv")}
    try:
        paths = [folder / each for each in list_files(folder)]
    except UserError as error:  # what lies beside the images need not be readable
        return [str(error)]
    unread = [path for path in paths if not {str(path), str(path.resolve())} & read]
    return [f"{path}: {_why_unread(name, path)}" for path in unread]


def _why_unread(name: str, path: Path) -> str:
    if name == "hf":
        return "not a data file to `datasets`"
    if not is_image(str(path)):
        return "not an image"
    return "in no class folder of a split" if name == "folder" else "not listed"


def inspect_data(
    name: str,
    root: Path | None,
    *,
    workers: int,
    download: bool = False,
    columns: Columns | None = None,
    max_pixels: int | None = None,
) -> Inspection:
    """Read every image of every split once, in `workers` processes, with a progress bar.

    The other arguments and errors are those of `open_source`.
    """
    names = available_splits(name, root, columns) or ("train",)
    read = partial(open_source, download=download, columns=columns, max_pixels=max_pixels)
    splits = {split: read(name, root, split) for split in names}
    images = {
        split: inspect_images(source, np.arange(len(source)), workers, split)
        for split, source in splits.items()
    }
    return Inspection(splits=splits, images=images, unread=_unread_files(name, root, splits))
