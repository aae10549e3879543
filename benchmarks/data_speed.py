"""How many images a second does one core read and augment, beside torchvision and timm?

    python benchmarks/data_speed.py --images data/raw/cifar10

Files on disk to float32 batches (64, 3, H, W) of 0 to 1, in one process and one thread; all take
turns, each a pass over the same files with new random draws. Files of 400 pixels are mosaics of
CIFAR photographs, those of 32 pixels CIFAR's own. torchvision.transforms.v2 runs on Pillow's images
and on uint8 tensors decoded by torchvision.io; the ratio, above 1 where ours is faster, is to the
faster of the two, as median and range over the passes. timm's are those of
timm.data.create_transform; it has neither padded crops nor the challenge's operations. Before
timing, the peers' resized images are compared with ours.
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from robust_submission.cli.command import Names, run
from robust_submission.data.augment import Augmentation
from robust_submission.data.challenge_operations import challenge_operations
from robust_submission.data.dataset import ImageDataset, collate
from robust_submission.data.images import read_image
from robust_submission.data.transforms import compose
from timing import median, print_machine, print_table, take_turns, times_as_fast

SEED = 0
BATCH_SIZE = 64
FILE_SIDE, TILES = 400, 8
SIZE, RESIZED, SMALL_SIZE = 224, 256, 32
SCALE = (0.08, 1.0)
PROBABILITY = 0.05
CUBIC = v2.InterpolationMode.BICUBIC
PEERS = ("torchvision, Pillow", "torchvision, tensors", "timm")
TENSORS_ONLY = ("gaussian_noise", "mosaic")
"""Shared operations that torchvision has for tensors, not for Pillow's images."""

Transform = Callable[[Any], Tensor]
"""A peer's, from its image to uint8 (3, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The same work, done by us and by whoever else does it."""

    title: str
    """What is done."""
    ours: Augmentation
    """From uint8 (H, W, 3) and a generator to uint8 (image_size, image_size, 3)."""
    pillow: Transform | None = None
    """torchvision's, from Pillow's image."""
    tensors: Transform | None = None
    """torchvision's, from uint8 (3, H, W)."""
    timm: Transform | None = None
    """timm's, from Pillow's image."""
    image_size: int = SIZE
    """Side of the result in pixels."""
    random: bool = True
    """Whether each pass draws anew; else all must give the same images."""


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg."""
    pipelines: Names = Names("resize,imagenet,light,challenge,shared")
    """resize: evaluation at 224 pixels; imagenet: random crop and flip; light: the same by padding,
    at 32; challenge: random crop and 32 operations; shared: those of them that torchvision has."""
    files: int = 256
    """Files of 400 pixels in a pass."""
    small_files: int = 4096
    """Files of 32 pixels in a pass."""
    rounds: int = 7
    """Passes of each contestant that count."""

    def __post_init__(self) -> None:
        if unknown := set(self.pipelines) - set(PIPELINES):
            raise ValueError(f"--pipelines: expected {', '.join(PIPELINES)}, found {min(unknown)}.")


def make_mosaics(photographs: Sequence[Path], folder: Path, files: int) -> list[Path]:
    """Write JPEG files of 8 x 8 photographs, each enlarged to 50 pixels; the first come again."""
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


def timm_transform(**settings: Any) -> Transform:
    """timm's pipeline at 224 pixels, bicubic, without its normalisation."""
    transform = create_transform(SIZE, interpolation="bicubic", normalize=False, **settings)
    assert isinstance(transform, transforms.Compose)
    return transform


def resize() -> Pipeline:
    """Evaluation: scale the shorter side, cut the centre."""
    steps = [v2.Resize(SIZE, CUBIC), v2.CenterCrop(SIZE)]
    return Pipeline(
        title="resize to 224",
        ours=Augmentation(name="none", image_size=SIZE),
        pillow=v2.Compose([*steps, v2.PILToTensor()]),
        tensors=v2.Compose(steps),
        timm=timm_transform(crop_pct=1.0),
        random=False,
    )


def imagenet() -> Pipeline:
    """A random crop, resized, and a flip."""
    steps = [v2.RandomResizedCrop(SIZE, SCALE, interpolation=CUBIC), v2.RandomHorizontalFlip()]
    return Pipeline(
        title="imagenet, 224",
        ours=Augmentation(name="imagenet", image_size=SIZE),
        pillow=v2.Compose([*steps, v2.PILToTensor()]),
        tensors=v2.Compose(steps),
        timm=timm_transform(is_training=True, scale=SCALE, color_jitter=None),
    )


def light() -> Pipeline:
    """CIFAR's recipe: pad by reflection, crop, flip."""
    crop = [v2.Pad(4, padding_mode="reflect"), v2.RandomCrop(SMALL_SIZE)]
    steps = [*crop, v2.RandomHorizontalFlip()]
    return Pipeline(
        title="light, 32",
        ours=Augmentation(name="light", image_size=SMALL_SIZE),
        pillow=v2.Compose([*steps, v2.PILToTensor()]),
        tensors=v2.Compose(steps),
        image_size=SMALL_SIZE,
    )


def challenge() -> Pipeline:
    """A random crop and the challenge's 32 operations."""
    return Pipeline(title="challenge, 224", ours=Augmentation(name="challenge", image_size=SIZE))


def shared_operations() -> dict[str, nn.Module]:
    """torchvision's twins of our operations, of about the same strength, by our names."""
    side = (13 / SIZE, 26 / SIZE)
    jitters = [v2.ColorJitter(saturation=each) for each in ((0.1, 0.3), (2, 20))]
    return {
        "gaussian_noise": v2.GaussianNoise(sigma=0.08),
        "mosaic": v2.RandomErasing(p=1, scale=(side[0] ** 2, side[1] ** 2), ratio=(1, 1)),
        "rgb_shuffle": v2.RandomChannelPermutation(),
        "rotation": v2.RandomRotation((-5, 5), v2.InterpolationMode.BILINEAR),
        "horizontal_flip": v2.RandomHorizontalFlip(p=1),
        "vertical_flip": v2.RandomVerticalFlip(p=1),
        "gaussian_blur": v2.GaussianBlur(11, sigma=(1, 2)),
        "elastic": v2.ElasticTransform(alpha=72.0, sigma=3.0),  # alpha is in half pixels
        "contrast": v2.ColorJitter(contrast=(0.05, 0.4)),
        "brightness": v2.ColorJitter(brightness=(1.1, 1.5)),
        "saturation": v2.RandomChoice(jitters),
        "jpeg_compression": v2.JPEG((7, 25)),
    }


class SharedOperations(Augmentation):
    """The challenge's random crop, and those of its operations that torchvision has too."""

    @cached_property
    def _compose(self) -> A.Compose:
        whole = compose(self).transforms
        named = zip(challenge_operations(SIZE, PROBABILITY), whole[2:], strict=True)
        shared_names = shared_operations().keys()
        return A.Compose([*whole[:2], *(each for name, each in named if name in shared_names)])


def shared() -> Pipeline:
    """The challenge's random crop, and those of its operations that torchvision has too."""
    twins = {
        name: v2.RandomApply([twin], PROBABILITY) for name, twin in shared_operations().items()
    }
    crop = [v2.Resize(RESIZED, CUBIC), v2.RandomResizedCrop(SIZE, SCALE, interpolation=CUBIC)]
    before = [twin for name, twin in twins.items() if name not in TENSORS_ONLY]
    after = [twins[name] for name in TENSORS_ONLY]
    return Pipeline(
        title=f"challenge, 224: the {len(twins)} operations that torchvision has",
        ours=SharedOperations(name="challenge", image_size=SIZE),
        pillow=v2.Compose([*crop, *before, v2.PILToTensor(), *after]),
        tensors=v2.Compose([*crop, *twins.values()]),
    )


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "resize": resize,
    "imagenet": imagenet,
    "light": light,
    "challenge": challenge,
    "shared": shared,
}


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


def batch_ours(paths: Sequence[Path], pipeline: Pipeline, epochs: Iterator[int]) -> Tensor:
    """Read and augment images as the loaders do: float32 (B, 3, H, W)."""
    dataset = ImageDataset(Files(paths), None, pipeline.image_size, pipeline.ours, SEED)
    epoch = next(epochs)
    keys = [(epoch, position) for position in range(len(paths))]
    return collate(dataset.__getitems__(keys), pipeline.image_size)["images"]


def batch_peer(paths: Sequence[Path], read: Callable[[Path], Any], transform: Transform) -> Tensor:
    """Read and transform images, and scale the whole batch as ours: float32 (B, 3, H, W)."""
    return torch.stack([transform(read(path)) for path in paths]).to(torch.float32).div_(255)


def read_pillow(path: Path) -> Image.Image:
    """Read with Pillow."""
    with Image.open(path) as image:
        return image.convert("RGB")


def read_tensor(path: Path) -> Tensor:
    """Read with torchvision.io: uint8 (3, H, W)."""
    return decode_image(str(path), ImageReadMode.RGB)


def one_pass(paths: Sequence[Path], batch: Callable[[Sequence[Path]], Tensor]) -> Tensor:
    """Make every batch of the files; the last is returned."""
    images = torch.empty(0)
    for start in range(0, len(paths), BATCH_SIZE):
        images = batch(paths[start : start + BATCH_SIZE])
    return images


def contestants(pipeline: Pipeline, paths: Sequence[Path]) -> dict[str, Callable[[], Tensor]]:
    """A pass over the files for ours and for each peer that there is."""
    ours = partial(batch_ours, pipeline=pipeline, epochs=count())
    found = {"ours": partial(one_pass, paths, ours)}
    readers = (read_pillow, read_tensor, read_pillow)
    offered = (pipeline.pillow, pipeline.tensors, pipeline.timm)
    for name, read, transform in zip(PEERS, readers, offered, strict=True):
        if transform is not None:
            peer = partial(batch_peer, read=read, transform=transform)
            found[name] = partial(one_pass, paths, peer)
    return found


def check(pipeline: Pipeline, paths: Sequence[Path]) -> None:
    """Compare the peers' batch with ours.

    Raises:
        ValueError: another type or shape; and, without random draws, other images.
    """
    own, *others = (work() for work in contestants(pipeline, paths).values())
    for found in others:
        if found.dtype != own.dtype or found.shape != own.shape:
            expected = f"{own.dtype} {tuple(own.shape)}"
            raise ValueError(f"expected {expected}, found {found.dtype} {tuple(found.shape)}.")
        if not pipeline.random and (distance := float((found - own).abs().mean())) >= 1 / 255:
            raise ValueError(f"expected a mean difference below 1/255, found {255 * distance}/255.")


def measure(pipeline: Pipeline, paths: Sequence[Path], rounds: int) -> list[str]:
    """The row of a pipeline."""
    check(pipeline, paths[:BATCH_SIZE])
    seconds = take_turns(contestants(pipeline, paths), rounds)
    rates = {name: f"{len(paths) / median(seconds, name):,.0f}" for name in seconds}
    row = [pipeline.title, *(rates.get(name, "-") for name in ("ours", *PEERS))]
    for rivals in (PEERS[:2], PEERS[2:]):
        found = [name for name in rivals if name in seconds]
        fastest = min(found, key=partial(median, seconds), default=None)
        row.append(times_as_fast(seconds, "ours", fastest) if fastest else "-")
    return row


def compare(options: Options) -> None:
    """Measure every pipeline and print the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(SEED)
    random.seed(SEED)
    photographs = sorted((options.images / "train").glob("*/*.jpg"), key=lambda path: path.name)
    if not photographs:
        raise ValueError(f"{options.images}: expected train/<class>/*.jpg, found none.")
    rows = list[list[str]]()
    with tempfile.TemporaryDirectory() as folder:
        mosaics = make_mosaics(photographs, Path(folder), options.files)
        for name in options.pipelines:
            pipeline = PIPELINES[name]()
            small = pipeline.image_size == SMALL_SIZE
            paths = photographs[: options.small_files] if small else mosaics
            rows.append(measure(pipeline, paths, options.rounds))
    ratios = ("ours / torchvision", "ours / timm")
    print_table(("images/s of one core", "ours", *PEERS, *ratios), rows)
    print_machine()


if __name__ == "__main__":
    run(compare, Options)
