"""Write a labelled dataset as WebDataset shards, the same bytes every time.

    python data/make_shards.py --data.name folder --data.root DIR --out SHARDS
    accelerate launch training/train.py --data.name shards --data.root SHARDS

Image files go in as they are, other images as PNG. SHARDS holds classes.txt and the tar files, in
train/, val/ and test/ where the dataset is divided so.
"""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, whole_folder
from robust_submission.data.sources import Source, available_splits, open_source
from robust_submission.data.sources.folders import FileSource


@dataclass(kw_only=True)
class DataOptions:
    """What is written."""

    name: str
    """digits, cifar10, svhn, fashion_mnist, folder, challenge or csv."""
    root: Path | None = None
    """Folder (or manifest) of the data; not needed for digits."""
    download: bool = False
    """Let torchvision download the data set if it is not in root."""


@dataclass(kw_only=True)
class Options:
    """Shards to write."""

    data: DataOptions
    """What is written."""
    out: Path
    """Folder of the shards, which appears when it is whole; nothing may stand there yet."""
    split: str | None = None
    """train, val or test alone; by default every split."""
    images_per_shard: int = 1000
    """Images in a shard; the last one holds what is left."""

    def __post_init__(self) -> None:
        if self.images_per_shard < 1:
            raise UserError(
                f"images_per_shard: expected at least 1, found {self.images_per_shard}."
            )


def _image_file(source: Source, index: int) -> tuple[str, bytes]:
    """The ending and the bytes of an image file."""
    if isinstance(source, FileSource):
        path = source.folder / str(source.ids[index])
        return path.suffix.lower(), path.read_bytes()
    content = io.BytesIO()
    Image.fromarray(source.image(index)).save(content, "PNG")
    return ".png", content.getvalue()


def _write_split(source: Source, folder: Path, images_per_shard: int) -> None:
    if source.labels is None or source.class_names is None:
        raise UserError("data.name: expected a source with labels, found one without.")
    folder.mkdir(exist_ok=True)
    cuts = range(0, len(source), images_per_shard)
    for shard, first in enumerate(tqdm(cuts, desc="shards")):
        with atomic_write(folder / f"{shard:06d}.tar") as path, tarfile.open(path, "w") as tar:
            for index in range(first, min(first + images_per_shard, len(source))):
                label = (".cls", str(source.labels[index]).encode())
                for ending, content in (_image_file(source, index), label):
                    header = tarfile.TarInfo(f"{index:08d}{ending}")  # of no user and no time
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))


def make_shards(options: Options) -> None:
    """Write the shards of each split, and the class names.

    Raises:
        UserError: no such data, no labels, or something in the folder's place already.
    """
    data = options.data
    splits = available_splits(data.name, data.root)
    with whole_folder(options.out) as out:
        for split in [options.split] if options.split else splits or ["train"]:
            source = open_source(data.name, data.root, split, download=data.download)
            _write_split(source, out / split if splits else out, options.images_per_shard)
            with atomic_write(out / "classes.txt") as path:
                path.write_text("".join(f"{name}\n" for name in source.class_names or []))


if __name__ == "__main__":
    run(make_shards, Options)
