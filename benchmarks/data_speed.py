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

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.data.augment import Augmentation
from robust_submission.data.dataset import ImageDataset, collate
from robust_submission.data.policies import POLICIES
from robust_submission.data.sources.source import FileSource
from timing import CommandOptions, median, print_table, take_turns, times_as_fast

BATCH_SIZE, FILES, SMALL_FILES = 64, 192, 2048
FILE_SIDE, TILES = 400, 8
CUBIC, LINEAR = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR
PEERS = ("torchvision", "timm")
Transform = Callable[[Any], Tensor]


@dataclass(kw_only=True)
class Options(CommandOptions):
    """What to measure."""

    rounds: int = 5


def timm_transform(**settings: Any) -> Transform:
    """timm's pipeline at 224 pixels, bicubic, without its normalisation."""
    return create_transform(224, interpolation="bicubic", normalize=False, **settings)  # pyright: ignore[reportReturnType]


CROP_AND_FLIP = [v2.RandomResizedCrop(224, interpolation=CUBIC), v2.RandomHorizontalFlip()]
ERASING = v2.RandomErasing(0.25, value="random")  # pyright: ignore[reportArgumentType]
PAD_AND_CROP = [v2.Pad(4, padding_mode="reflect"), v2.RandomCrop(32), v2.RandomHorizontalFlip()]
PIPELINES: dict[str, dict[str, Transform]] = {
    "none": {
        "torchvision": v2.Compose([v2.Resize(224, CUBIC), v2.CenterCrop(224)]),
        "timm": timm_transform(crop_pct=1.0),
    },
    "imagenet": {
        "torchvision": v2.Compose(CROP_AND_FLIP),
        "timm": timm_transform(is_training=True, color_jitter=None),
    },
    "imagenet, randaugment": {
        "timm": timm_transform(is_training=True, auto_augment="rand-m9-mstd0.5-mmax9-inc1"),
    },
    "imagenet, trivialaugment": {
        "torchvision": v2.Compose([*CROP_AND_FLIP, v2.TrivialAugmentWide(interpolation=LINEAR)])
    },
    "imagenet, erasing": {"torchvision": v2.Compose([*CROP_AND_FLIP, ERASING])},
    "light": {"torchvision": v2.Compose(PAD_AND_CROP)},
    "challenge": {},
}
"""By our augmentation's name and what follows it, the peers' transforms that do the same, to uint8
(3, side, side): torchvision's from such a tensor, timm's from Pillow's image. light has a side of
32, others 224. torchvision's policies of tensors have no
bicubic. mmax9, because timm 1.0.31 cannot posterize at strength 10 with Pillow 13."""


def make_mosaics(photographs: Sequence[Path], folder: Path) -> list[Path]:
    """Write JPEG files of 8 x 8 photographs, each enlarged to 50 pixels."""
    side = FILE_SIDE // TILES
    paths = [folder / f"{index}.jpg" for index in range(FILES)]
    for index, path in enumerate(paths):
        mosaic = Image.new("RGB", (FILE_SIDE, FILE_SIDE))
        for place in range(TILES**2):
            photograph = photographs[(index * TILES**2 + place) % len(photographs)]
            tile = read_pillow(photograph).resize((side, side), Image.Resampling.BICUBIC)
            mosaic.paste(tile, (place % TILES * side, place // TILES * side))
        mosaic.save(path, quality=90)
    return paths


def read_pillow(path: Path) -> Image.Image:
    """Read with Pillow, as timm does."""
    with Image.open(path) as image:
        return image.convert("RGB")


def read_torchvision(path: Path) -> Tensor:
    return decode_image(str(path), mode=ImageReadMode.RGB)


def pass_of_ours(dataset: ImageDataset, epochs: "count[int]") -> Tensor:
    """Read and augment all files as the loaders do; the last batch is returned."""
    epoch, images = next(epochs), torch.empty(0)
    for start in range(0, len(dataset), BATCH_SIZE):
        keys = [(epoch, place) for place in range(start, min(start + BATCH_SIZE, len(dataset)))]
        images = collate(dataset.__getitems__(keys), dataset.image_size)["images"]
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


def measure(name: str, paths: Sequence[Path], rounds: int) -> list[str]:
    """The row of a pipeline."""
    side = 32 if name == "light" else 224
    first, _, then = name.partition(", ")
    augmentation = Augmentation(
        name=first,
        image_size=side,
        policy=then if then in POLICIES else "none",
        erasing=0.25 if then == "erasing" else 0,
    )
    ids = np.array([str(path) for path in paths])
    source = FileSource(folder=Path(), ids=ids, least_side=augmentation.least_side)
    dataset = ImageDataset(source, None, side, augmentation, seed=0)
    works = {"ours": partial(pass_of_ours, dataset, count())}
    for peer, transform in PIPELINES[name].items():
        read = read_pillow if peer == "timm" else read_torchvision
        works[peer] = partial(pass_of_peer, paths, read, transform)
    own, *others = (work() for work in works.values())
    if name == "none":
        for other in others:
            assert (other - own).abs().mean() < 1 / 255, "a peer's resized images are not ours"
    seconds = take_turns(works, rounds)
    rates = [
        f"{len(paths) / median(seconds, each):,.0f}" if each in seconds else "-"
        for each in ("ours", *PEERS)
    ]
    ratios = [times_as_fast(seconds, "ours", peer) if peer in seconds else "-" for peer in PEERS]
    return [f"{name}, {side} px", *rates, *ratios]


def compare(options: Options) -> None:
    """Measure every pipeline and print the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(0)
    random.seed(0)
    photographs = sorted((options.images / "train").glob("*/*.jpg"), key=lambda path: path.name)
    if not photographs:
        raise UserError(f"{options.images}: expected train/<class>/*.jpg, found none.")
    with tempfile.TemporaryDirectory() as folder:
        mosaics = make_mosaics(photographs, Path(folder))
        small = photographs[:SMALL_FILES]
        rows = [
            measure(name, small if name == "light" else mosaics, options.rounds)
            for name in PIPELINES
        ]
    columns = ("images/s of one core", "ours", *PEERS, *(f"ours / {name}" for name in PEERS))
    print_table(columns, rows)


if __name__ == "__main__":
    run(compare, Options)
