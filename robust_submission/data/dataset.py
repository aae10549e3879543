"""The images of a source at the size that a model expects, and their batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from robust_submission.cli.errors import UserError
from robust_submission.data.images import resize_image
from robust_submission.data.sources import Source

NO_LABEL = -1
READ_TOGETHER = 16
"""Images that are read before the first of them is augmented. Small images then take three quarters
of the time: the processor's caches hold the code of one step, not of both."""

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""uint8 (H, W, 3) and a source of randomness to uint8 (image_size, image_size, 3)."""

_Key = int | tuple[int, int]


class Item(TypedDict):
    """One image: uint8 (H, W, 3) RGB, its label (-1 without one) and its index in the source."""

    image: np.ndarray
    label: int
    index: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """An unreadable image: its index, a message for the user, and its place in the batch."""

    index: int
    message: str
    place: int


class Batch(TypedDict):
    """Images with their labels and indices; unreadable ones are listed apart."""

    images: Tensor
    """float32 (B, 3, H, W), RGB, 0 to 1."""
    labels: Tensor
    """int64 (B,); -1 where there is no label."""
    indices: Tensor
    """int64 (B,): each image's index in the source."""
    skipped: list[Skipped]
    """Images that could not be read, none of them among the above."""


class ImageDataset(Dataset[Item]):
    """Images of a source, augmented as a function of (seed, epoch, index) alone.

    A key is a position in `indices`, or a pair (epoch, position): the sampler passes the epoch,
    which therefore reaches workers that stay alive over epochs. Where extra images are mixed in,
    the pass over its set takes the epoch's place.

    Args:
        source: Where the images come from.
        indices: int64 (N,), which images and in which order; None for all.
        image_size: Side of the images in pixels.
        augmentation: To `image_size`; None only resizes, the same in every epoch.
        seed: Seed of the augmentation.
        skip_bad: Loaders list unreadable images in `skipped` instead of raising an error.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray | None,
        image_size: int,
        augmentation: Augment | None = None,
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        self.source = source
        self.indices = np.arange(len(source)) if indices is None else np.asarray(indices)
        self.image_size = image_size
        self.augmentation = augmentation
        self.seed = seed
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: _Key) -> Item:
        """Read and augment one image; UserError if it cannot be read."""
        epoch, index = self._epoch_and_index(key)
        return self._item(epoch, index, self.source.image(index))

    def __getitems__(self, keys: Sequence[_Key]) -> list[Item | Skipped]:
        """Several images at once, as loaders ask for them; a bad file raises nothing.

        torch would wrap an exception of a worker in its traceback; the loader raises the message
        in the main process instead.
        """
        items = list[Item | Skipped]()
        for start in range(0, len(keys), READ_TOGETHER):
            group = [self._epoch_and_index(key) for key in keys[start : start + READ_TOGETHER]]
            images = [self._read(index, place) for place, (_, index) in enumerate(group, start)]
            items += [
                image if isinstance(image, Skipped) else self._item(epoch, index, image)
                for image, (epoch, index) in zip(images, group, strict=True)
            ]
        return items

    def _read(self, index: int, place: int) -> np.ndarray | Skipped:
        try:
            return self.source.image(index)
        except UserError as error:
            return Skipped(index, str(error), place)

    def _item(self, epoch: int, index: int, image: np.ndarray) -> Item:
        if self.augmentation is None:
            image = resize_image(image, self.image_size)
        else:
            image = self.augmentation(image, np.random.default_rng([self.seed, epoch, index]))
            assert image.shape[:2] == (self.image_size, self.image_size), image.shape
        labels = self.source.labels
        label = NO_LABEL if labels is None else int(labels[index])
        return Item(image=image, label=label, index=index)

    def _epoch_and_index(self, key: _Key) -> tuple[int, int]:
        epoch, position = key if isinstance(key, tuple) else (0, key)
        return epoch, int(self.indices[position])


def collate(items: Sequence[Item | Skipped], image_size: int) -> Batch:
    """Make a batch of the results of `ImageDataset.__getitems__`, in their order."""
    read = [item for item in items if not isinstance(item, Skipped)]
    images = np.empty((len(read), 3, image_size, image_size), dtype=np.uint8)
    for place, item in enumerate(read):
        images[place] = item["image"].transpose(2, 0, 1)
    # By numpy, in one thread: torch's threads belong to the model, and a second team slows both.
    pixels = np.divide(images, np.float32(255), dtype=np.float32)
    return Batch(
        images=torch.from_numpy(pixels),
        labels=torch.tensor([item["label"] for item in read], dtype=torch.int64),
        indices=torch.tensor([item["index"] for item in read], dtype=torch.int64),
        skipped=[item for item in items if isinstance(item, Skipped)],
    )
