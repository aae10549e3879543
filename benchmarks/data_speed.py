"""Reading and augmenting beside torchvision and timm: images per second of one core.

    python benchmarks/data_speed.py --images data/raw/cifar10

JPEG files to float32 batches (64, 3, H, W), 0 to 1, in one process and one thread. Files of 400
pixels are mosaics of CIFAR photographs, those of 32 pixels are CIFAR's. torchvision.transforms.v2
works on uint8 tensors decoded by torchvision.io; timm's transforms on Pillow's images. Neither has
the challenge's 32 operations.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from robust_submission.cli.command import Names, run
from robust_submission.cli.errors import UserError
from robust_submission.data.augment import Augmentation
from robust_submission.data.dataset import ImageDataset, collate
from robust_submission.data.images import read_image
from timing import median, print_table, take_turns, times_as_fast

SEED, BATCH_SIZE = 0, 64
FILE_SIDE, TILES = 400, 8
CUBIC = v2.InterpolationMode.BICUBIC
PEERS = ("torchvision", "timm")
Transform = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The same work, done by ours and by each peer that has it."""

    name: str
    """Of our augmentation."""
    image_size: int = 224
    torchvision: Transform | None = None
    """From uint8 (3, H, W) to uint8 (3, image_size, image_size)."""
    timm: Transform | None = None
    """From Pillow's image to the same."""


def timm_transform(**settings: Any) -> Transform:
    """timm's pipeline at 224 pixels, bicubic, without its normalisation."""
    return create_transform(224, interpolation="bicubic", normalize=False, **settings)  # pyright: ignore[reportReturnType]


PIPELINES = (
    Pipeline(
        name="none",
        torchvision=v2.Compose([v2.Resize(224, CUBIC), v2.CenterCrop(224)]),
        timm=timm_transform(crop_pct=1.0),
    ),
    Pipeline(
        name="imagenet",
        torchvision=v2.Compose(
            [v2.RandomResizedCrop(224, interpolation=CUBIC), v2.RandomHorizontalFlip()]
        ),
        timm=timm_transform(is_training=True, color_jitter=None),
    ),
    Pipeline(
        name="light",
        image_size=32,
        torchvision=v2.Compose(
            [v2.Pad(4, padding_mode="reflect"), v2.RandomCrop(32), v2.RandomHorizontalFlip()]
        ),
    ),
    Pipeline(name="challenge"),
)


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg."""
    pipelines: Names = Names([each.name for each in PIPELINES])
    """none: resize to 224 pixels; imagenet: random crop and flip; light: the same by padding, at
    32; challenge: random crop and 32 operations."""
    files: int = 192
    """Files of 400 pixels per pass."""
    small_files: int = 2048
    """Files of 32 pixels per pass."""
    rounds: int = 5
    """Passes that are counted."""


def make_mosaics(photographs: Sequence[Path], folder: Path, files: int) -> list[Path]:
    """Write JPEG files of 8 x 8 photographs, each enlarged to 50 pixels."""
    side = FILE_SIDE // TILES
    paths = [folder / f"{index}.jpg" for index in range(files)]
    for index, path in enumerate(paths):
        mosaic = Image.new("RGB", (FILE_SIDE, FILE_SIDE))
        for place in range(TILES**2):
            photograph = photographs[(index * TILES**2 + place) % len(photographs)]
            with Image.open(photograph) as image:
                tile = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            mosaic.paste(tile, (place % TILES * side, place // TILES * side))
        mosaic.save(path, quality=90)
    return paths


@dataclass(frozen=True)
class Files:
    """Image files as a source without labels."""

    paths: Sequence[Path]
    labels = class_names = None

    @property
    def ids(self) -> np.ndarray:
        return np.array([str(path) for path in self.paths])

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> np.ndarray:
        return read_image(self.paths[index])


def read_pillow(path: Path) -> Image.Image:
    """Read with Pillow, as timm does."""
    with Image.open(path) as image:
        return image.convert("RGB")


def pass_of_ours(paths: Sequence[Path], pipeline: Pipeline, epochs: "count[int]") -> Tensor:
    """Read and augment all files as the loaders do; the last batch is returned."""
    augmentation = Augmentation(name=pipeline.name, image_size=pipeline.image_size)
    dataset = ImageDataset(Files(paths), None, pipeline.image_size, augmentation, SEED)
    epoch, images = next(epochs), torch.empty(0)
    for start in range(0, len(paths), BATCH_SIZE):
        keys = [(epoch, place) for place in range(start, min(start + BATCH_SIZE, len(paths)))]
        images = collate(dataset.__getitems__(keys), pipeline.image_size)["images"]
    return images


def pass_of_peer(
    paths: Sequence[Path], read: Callable[[Path], Any], transform: Transform
) -> Tensor:
    """Read and transform all files, and scale each batch; the last batch is returned."""
    images = torch.empty(0)
    for start in range(0, len(paths), BATCH_SIZE):
        some = [transform(read(path)) for path in paths[start : start + BATCH_SIZE]]
        images = torch.stack(some).to(torch.float32).div_(255)
    return images


def measure(pipeline: Pipeline, paths: Sequence[Path], rounds: int) -> list[str]:
    """The row of a pipeline.

    Raises:
        ValueError: A peer's resized images are not ours, to a mean of 1/255.
    """
    works = {"ours": partial(pass_of_ours, paths, pipeline, count())}
    if pipeline.torchvision:
        read = partial(decode_image, mode=ImageReadMode.RGB)
        works["torchvision"] = partial(
            pass_of_peer, paths, lambda path: read(str(path)), pipeline.torchvision
        )
    if pipeline.timm:
        works["timm"] = partial(pass_of_peer, paths, read_pillow, pipeline.timm)
    own, *others = (work() for work in works.values())
    for other in others:
        if pipeline.name == "none" and (gap := (other - own).abs().mean()) >= 1 / 255:
            raise ValueError(f"expected a mean difference below 1/255, found {255 * gap}/255.")
    seconds = take_turns(works, rounds)
    rates = [
        f"{len(paths) / median(seconds, name):,.0f}" if name in seconds else "-"
        for name in ("ours", *PEERS)
    ]
    ratios = [times_as_fast(seconds, "ours", name) if name in seconds else "-" for name in PEERS]
    return [f"{pipeline.name}, {pipeline.image_size} px", *rates, *ratios]


def compare(options: Options) -> None:
    """Measure every pipeline and print the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(SEED)
    random.seed(SEED)
    photographs = sorted((options.images / "train").glob("*/*.jpg"), key=lambda path: path.name)
    if not photographs:
        raise UserError(f"{options.images}: expected train/<class>/*.jpg, found none.")
    with tempfile.TemporaryDirectory() as folder:
        mosaics = make_mosaics(photographs, Path(folder), options.files)
        rows = [
            measure(
                each,
                photographs[: options.small_files] if each.image_size == 32 else mosaics,
                options.rounds,
            )
            for each in PIPELINES
            if each.name in options.pipelines
        ]
    columns = ("images/s of one core", "ours", *PEERS, *(f"ours / {name}" for name in PEERS))
    print_table(columns, rows)


if __name__ == "__main__":
    run(compare, Options)
