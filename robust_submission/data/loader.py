"""Loaders whose batches depend on the seed and the epoch, never on workers or processes.

training = TrainingLoader(dataset, batch_size=128, num_workers=4, seed=0)
training.set_epoch(3)
for batch in training: ...
for batch in micro_batches(EvaluationLoader(dataset, batch_size=64, num_workers=4)): ...
"""

import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path
from threading import Thread, get_native_id
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from robust_submission.cli.errors import UserError
from robust_submission.data.dataset import NO_LABEL, Batch, ImageDataset, Skipped, collate
from robust_submission.data.sources import MixedSource

Read = TypeVar("Read")


def micro_batch_size(image_size: int) -> int:
    """How many images a model sees at once wherever it is measured; depends on the side alone.

    32 at 224 pixels and above. Of smaller images, as many as have the same number of pixels, at
    most 128: with few small images at a time a network is mostly waiting. Four times as many on a
    GPU, for the same reason.
    """
    times = 4 if torch.accelerator.is_available() else 1
    return times * min(max(32, 32 * 224**2 // image_size**2), 128)


def even_size(number: int, largest: int) -> int:
    """Size of each part of `number` images in 1, 2, 4, 8 … equal parts of at most `largest`.

    Two, four or eight processes then each get the same number of parts.
    """
    parts = 1 << (-(-number // largest) - 1).bit_length()
    return -(-number // parts)


class MicroBatch(Batch):
    """A batch of a fixed size; from `count` on it is padding: zeros, with label and index -1."""

    count: int


def _prepare_worker(worker: int) -> None:
    """Make a worker ignore Ctrl-C, and SIGTERM from any process but the one that started it.

    A launcher or a scheduler sends both to all processes; the main process ends its workers itself,
    by SIGTERM, when it exits. Without sigwaitinfo (macOS), workers keep torch's handling.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_parent, name="signals", daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def read_ahead(batches: Iterator[Read]) -> Iterator[Read]:
    """The same batches; a thread reads the next one while this one is used."""
    with ThreadPoolExecutor(1, "reader") as reader:
        number = reader.submit(get_native_id).result()
        try:
            following = reader.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = reader.submit(next, batches, None)
                yield batch
        finally:
            reader.shutdown()
            # Python joins a thread before the system has ended it. Ending, it may hold a library's
            # lock, for which a worker that is forked meanwhile would wait without end.
            while Path(f"/proc/self/task/{number}").exists():
                time.sleep(0.001)


def _torch_loader(
    dataset: ImageDataset, batches: Sampler[list[Any]], num_workers: int
) -> DataLoader[Batch]:
    return DataLoader[Any](
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=partial(collate, image_size=dataset.image_size),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # else each pass would draw from torch's global one
    )


def _checked(loader: DataLoader[Batch], skip_bad: bool) -> Iterator[Batch]:
    batches = iter(loader)
    for batch in batches if loader.num_workers else read_ahead(batches):
        if batch["skipped"] and not skip_bad:
            raise UserError(batch["skipped"][0].message)
        yield batch


class _TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Part of each batch of a permutation drawn from (seed, epoch), as (epoch, position)."""

    def __init__(self, size: int, batch_size: int, seed: int, part: slice) -> None:
        self.size, self.batch_size, self.seed, self.part = size, batch_size, seed, part
        self.epoch = self.start_step = 0

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start_step = self.epoch, self.start_step
        # The epoch as spawn_key, which never coincides with an image's [seed, epoch, index].
        draw = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        order = np.random.default_rng(draw).permutation(self.size)
        batches = order[: len(self) * self.batch_size].reshape(-1, self.batch_size)
        for batch in batches[start_step:, self.part]:
            yield [(epoch, position) for position in batch.tolist()]


def _passes(size: int, seed: int, key: tuple[int, ...], start: int) -> Iterator[tuple[int, int]]:
    """An endless row of permutations from place `start` on, as (pass, position)."""
    for number in count(start // size):
        draw = np.random.SeedSequence(seed, spawn_key=(number, *key))
        for position in np.random.default_rng(draw).permutation(size)[start % size :]:
            yield number, int(position)
        start = 0


class _MixedBatches(_TrainingBatches):
    """Part of each batch of base and extra images, as (pass over its set, position).

    The pass takes the epoch's place, as a small extra set is used several times in an epoch. Steps
    are counted from the start of training, so that all images of a set are used equally often.
    """

    extra: int
    """How many extra images there are; their positions follow those of the others."""
    share: int
    """How many of them are in a batch."""

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, last = self.epoch * len(self) + self.start_step, (self.epoch + 1) * len(self)
        # Evenly over the batch, so that every process and every accumulated part has its share; in
        # random places within eight, as images are mixed in pairs of neighbours.
        is_extra = np.zeros(self.batch_size, dtype=bool)
        is_extra[np.arange(self.share) * self.batch_size // self.share] = True
        eights = is_extra.reshape(-1, math.gcd(self.batch_size, 8))
        base = _passes(self.size, self.seed, (), first * (self.batch_size - self.share))
        others = _passes(self.extra, self.seed, (1,), first * self.share)
        extra = ((number, self.size + position) for number, position in others)
        for step in range(first, last):
            draw = np.random.SeedSequence(self.seed, spawn_key=(2, step))
            places = np.random.default_rng(draw).permuted(eights, axis=1).ravel()
            yield [next(extra if each else base) for each in places][self.part]


def _training_batches(
    dataset: ImageDataset, batch_size: int, seed: int, part: slice
) -> _TrainingBatches:
    """How a data set is cut into batches; of a `MixedSource`, the base images come first."""
    source, size = dataset.source, len(dataset)
    if not isinstance(source, MixedSource):
        return _TrainingBatches(size, batch_size, seed, part)
    base = int(np.sum(dataset.indices < len(source.base)))
    batches = _MixedBatches(base, batch_size, seed, part)
    batches.extra, batches.share = size - base, round(source.fraction * batch_size)
    if not 0 < batches.share < batch_size:
        expected = f"a share that leaves base and extra images in a batch of {batch_size}"
        raise UserError(f"data.extra.fraction: expected {expected}, found {source.fraction:g}.")
    return batches


class TrainingLoader:
    """Shuffled, augmented batches of one epoch; the order is a function of (seed, epoch).

    Each global batch is cut into `num_processes` contiguous equal parts, one per process. Images
    that do not fill the last global batch of an epoch are left out, different ones each time.

    Of a `MixedSource`, each global batch has the same number of extra images, spread evenly. An
    epoch has as many steps as without them (Gowal et al. 2021, arXiv 2110.09468).

    Args:
        dataset: The images; of a `MixedSource`, base images first.
        batch_size: Images per step, over all processes together.
        num_workers: Processes that read images; 0 reads in this one.
        seed: Of the order.
        process_index: Which of the processes this is.
        num_processes: How many train together.

    Raises:
        UserError: the batch size is not a multiple of the processes, or exceeds the number of
            (base) images, or has no place for extra or for base images. Iterating raises it for an
            unreadable image, also with `skip_bad`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % num_processes:
            multiple = f"a multiple of the {num_processes} processes"
            raise UserError(f"batch_size: expected {multiple}, found {batch_size}.")
        share = batch_size // num_processes
        part = slice(process_index * share, (process_index + 1) * share)
        self.dataset = dataset
        self._batches = _training_batches(dataset, batch_size, seed, part)
        if not len(self._batches):
            least = f"at least {batch_size} training images (one batch)"
            raise UserError(f"data: expected {least}, found {self._batches.size}.")
        self._loader = _torch_loader(dataset, self._batches, num_workers)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Make the next pass epoch `epoch`, from step `start_step` on."""
        if not 0 <= start_step <= len(self):
            raise UserError(f"start_step: expected 0 to {len(self)}, found {start_step}.")
        self._batches.epoch, self._batches.start_step = epoch, start_step

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return _checked(self._loader, skip_bad=False)


class EvaluationLoader:
    """Every image once, in order; micro-batch k (see `micro_batches`) goes to process k % P.

    Args:
        dataset: The images; with `skip_bad`, unreadable ones are in a batch's `skipped`.
        batch_size: Images that are read at once in this process.
        num_workers: Processes that read images; 0 reads in this one.
        process_index: Which of the processes this is.
        num_processes: How many evaluate together.
        size: Images of a micro-batch; None for `micro_batch_size`.

    Raises:
        UserError: a batch size below 1. Iterating raises it for an unreadable image, unless the
            dataset has `skip_bad`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        num_workers: int,
        process_index: int = 0,
        num_processes: int = 1,
        size: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: expected at least 1, found {batch_size}.")
        self.dataset = dataset
        self.micro_batch_size = size or micro_batch_size(dataset.image_size)
        positions = np.arange(len(dataset))
        mine = positions[positions // self.micro_batch_size % num_processes == process_index]
        self.num_images = len(mine)
        self.num_micro_batches = -(-self.num_images // self.micro_batch_size)
        batches = BatchSampler(mine.tolist(), batch_size, drop_last=False)
        self._loader = _torch_loader(dataset, batches, num_workers)

    def __len__(self) -> int:
        """Batches in this process."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return _checked(self._loader, self.dataset.skip_bad)


_Image = tuple[Tensor, Tensor, Tensor]  # (3, H, W), (), ()


def _one_by_one(loader: EvaluationLoader) -> Iterator[_Image | Skipped]:
    """Images and skipped ones, in the order in which the loader was to read them."""
    for batch in loader:
        skipped = {unreadable.place: unreadable for unreadable in batch["skipped"]}
        read = zip(batch["images"], batch["labels"], batch["indices"], strict=True)
        for place in range(len(batch["indices"]) + len(skipped)):
            yield skipped[place] if place in skipped else next(read)


def micro_batches(loader: EvaluationLoader) -> Iterator[MicroBatch]:
    """Regroup a loader's images into batches of one shape (size, 3, H, W).

    Micro-batch k holds the dataset's positions from k * size on: first the readable images, then
    zeros. Batch size, workers and processes do not change which micro-batch an image is in, or its
    place there. `count` is 0 where no image was readable.
    """
    images = _one_by_one(loader)
    size, side = loader.micro_batch_size, loader.dataset.image_size
    while group := list(islice(images, size)):
        read = [image for image in group if not isinstance(image, Skipped)]
        batch = MicroBatch(
            images=torch.zeros(size, 3, side, side),
            labels=torch.full((size,), NO_LABEL),
            indices=torch.full((size,), -1),
            skipped=[image for image in group if isinstance(image, Skipped)],
            count=len(read),
        )
        for place, one in enumerate(read):
            batch["images"][place], batch["labels"][place], batch["indices"][place] = one
        yield batch
