"""The images that a model is evaluated on, and their order."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_submission.cli.errors import UserError, log_once
from robust_submission.data.dataset import NO_LABEL, ImageDataset
from robust_submission.data.inspection import inspect_images
from robust_submission.data.loader import EvaluationLoader, MicroBatch, micro_batches
from robust_submission.data.sources import (
    Columns,
    Source,
    StoredSource,
    available_splits,
    held_out_images,
    match_classes,
    open_source,
    read_recipe,
    recipe_columns,
    stratified_subset,
)
from robust_submission.settings import DataOptions


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Labelled images in the order in which they are attacked."""

    source: Source
    labels: np.ndarray
    """int64 (N,): the labels of the source."""
    class_names: list[str]
    indices: np.ndarray
    """int64 (n,): which images of the source; the first `curve_images` are used for the curves."""
    curve_images: int
    description: dict[str, Any]
    """What the report says about the data."""
    batch_size: int = 64
    """Images that each process reads at a time; changes no result."""
    num_workers: int = 0
    """Processes that read images; changes no result."""
    by_name: bool = True
    """Whether classes are matched with a model's by name."""

    def matched_to(self, class_names: Sequence[str] | None) -> "EvaluationData":
        """The same images with the labels of a model that has these classes, if it names any.

        Raises:
            UserError: see `match_classes`.
        """
        if class_names is None or list(class_names) == self.class_names:
            return self
        place = self.description["source"]
        if self.by_name:
            labels, names = match_classes(self.labels, self.class_names, class_names, place)
        elif len(self.class_names) <= len(class_names):
            labels, names = self.labels, list(class_names)
        else:
            return self  # the model has too few outputs, which will be said
        assert isinstance(self.source, StoredSource)
        source = replace(self.source, labels=labels, class_names=names)
        return replace(self, source=source, labels=labels, class_names=names)

    def numbered(self, count: int) -> "EvaluationData":
        """The same with the names 0 to `count` - 1; unchanged where there are as many classes."""
        names = [str(number) for number in range(count)]
        return self if len(self.class_names) == count else replace(self, class_names=names)

    def require_classes_of(self, class_names: Sequence[str] | None, model: object) -> None:
        """Raise UserError if a second model, such as a twin, numbers these classes otherwise."""
        if class_names is None:
            return
        same = np.array_equal(self.matched_to(class_names).labels, self.labels)
        if not same or len(class_names) != len(self.class_names):
            expected = f"the {len(self.class_names)} classes of the evaluated model in their order"
            raise UserError(f"{model}: expected {expected}, found others.")

    def first_images(self, image_size: int, count: int = 32) -> Tensor:
        """The first images, (B, 3, image_size, image_size), float32, 0 to 1, to try a model on."""
        rows = np.arange(min(count, len(self.indices)))
        return next(self.micro_batches(rows, image_size, len(rows), 0, 1))["images"]

    def micro_batches(
        self, rows: np.ndarray, image_size: int, size: int, process_index: int, num_processes: int
    ) -> Iterator[MicroBatch]:
        """The images of these rows in micro-batches of `size`, of which this process gets its part.

        Args:
            rows: int64 (m,), places in `indices`.
            image_size: Side of the images in pixels.
            size: Images of a micro-batch; the last one is padded.
            process_index: Number k of this process: it gets the micro-batches k, k + P, k + 2 P, …
            num_processes: Number of processes P.

        Raises:
            UserError: an image cannot be read.
        """
        if isinstance(self.source, TensorSource):
            for start in range(process_index * size, len(rows), num_processes * size):
                yield self.source.micro_batch(self.indices[rows[start : start + size]], size)
            return
        loader = EvaluationLoader(
            ImageDataset(self.source, self.indices[rows], image_size),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            process_index=process_index,
            num_processes=num_processes,
            size=size,
        )
        yield from micro_batches(loader)


def _as_tensor(name: str, values: object) -> Tensor:
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        found = type(values).__name__
        raise UserError(f"{name}: expected a tensor or an array, found {found}: {error}") from error


class TensorSource:
    """Images in memory, which reach the model exactly as they are.

    Args:
        images: (N, 3, S, S), RGB; floating point from 0 to 1, or uint8.
        labels: (N,), integers; a floating point type may hold them.

    Raises:
        UserError: images or labels of another shape, type or range.
    """

    def __init__(
        self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray | Sequence[int]
    ) -> None:
        images, numbers = _as_tensor("images", images), _as_tensor("labels", labels)
        whole = numbers.long()
        if not torch.equal(numbers.double(), whole.double()):
            raise UserError(f"labels: expected integers, found {numbers.flatten()[:3].tolist()} ….")
        self.images = images.float() if images.dtype == torch.bfloat16 else images
        self.labels = whole.numpy()
        self.class_names = list[str]()
        self.ids = np.array([str(index) for index in range(len(images))])
        shape = tuple(images.shape)
        if images.ndim != 4 or shape[1] != 3 or shape[2] != shape[3] or not len(images):
            raise UserError(f"images: expected shape (N, 3, S, S), found {shape}.")
        if self.labels.shape != shape[:1]:
            raise UserError(f"labels: expected shape {shape[:1]}, found {self.labels.shape}.")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise UserError(f"images: expected floating point or uint8, found {images.dtype}.")
        if images.is_floating_point() and not (images.min() >= 0 and images.max() <= 1):
            found = f"{float(images.min()):g} to {float(images.max()):g}"
            raise UserError(f"images: expected values from 0 to 1, found {found}.")

    def __len__(self) -> int:
        return len(self.images)

    def name_classes(self, names: Sequence[str], known: Sequence[str] | None) -> None:
        """Name the classes in label order, and number them as a model does that has names for them.

        Raises:
            UserError: a label has no name; see also `match_classes`.
        """
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= len(names):
            raise UserError(f"labels: expected 0 to {len(names) - 1}, found {low} to {high}.")
        self.labels, self.class_names = match_classes(self.labels, names, known or names, "labels")

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (H, W, 3), RGB, for display."""
        image = self.images[index].permute(1, 2, 0)
        return (image if image.dtype == torch.uint8 else (255 * image).round().byte()).numpy()

    def micro_batch(self, indices: np.ndarray, size: int) -> MicroBatch:
        """These images, padded to `size`."""
        count, shape = len(indices), self.images.shape[1:]
        pixels = self.images[indices].numpy()
        batch = MicroBatch(
            images=torch.zeros(size, *shape),
            labels=torch.full((size,), NO_LABEL),
            indices=torch.full((size,), -1),
            skipped=[],
            count=count,
        )
        scale = np.float32(255 if pixels.dtype == np.uint8 else 1)
        batch["images"][:count] = torch.from_numpy(np.divide(pixels, scale, dtype=np.float32))
        batch["labels"][:count] = torch.from_numpy(self.labels[indices])
        batch["indices"][:count] = torch.from_numpy(indices)
        return batch


def open_evaluation_data(
    options: DataOptions,
    checkpoint: Path | None,
    limit: int | None,
    curve_images: int | None,
    seed: int,
) -> EvaluationData:
    """Open the data and choose the images.

    Args:
        options: The data; without a name, the test images of the run in `checkpoint`.
        checkpoint: A run folder.
        limit: The largest number of images, stratified by class; None for all.
        curve_images: How many of them, stratified as well, are used for the curves; None for a
            tenth of them, at least 32 and at most 100.
        seed: Seed of both choices.

    Raises:
        UserError: no such data, no labels, a limit below 1, or a root of data without a name.
    """
    if options.name:
        columns = Columns(image=options.image_column, label=options.label_column)
        source = open_source(
            options.name,
            options.root,
            options.split,
            download=options.download,
            columns=columns,
            max_pixels=options.max_pixels,
        )
        candidates, part = np.arange(len(source)), f"split {options.split}"
        origin = options.name if options.root is None else f"{options.name} in {options.root}"
    elif options.root or options.download:
        raise UserError("expected --data.name with --data.root or --data.download, found none.")
    else:
        source, candidates, origin, part = _of_the_run(checkpoint, options)
        if read_recipe(checkpoint, "--data.name")["data"].get("skip_bad"):
            candidates = _without_unreadable(source, candidates)
    if source.labels is None:
        raise UserError(f"{origin}: expected images with labels, found none.")
    chosen = candidates[stratified_subset(source.labels[candidates], limit, seed)]
    how = "all" if len(chosen) == len(candidates) else f"a stratified draw with seed {seed}"
    about = {"source": origin, "part": part, "images": len(chosen), "of": len(candidates)}
    data = arrange_images(source, chosen, curve_images, seed, about | {"chosen": how})
    return replace(data, by_name=options.labels == "names")


def arrange_images(
    source: Source,
    chosen: np.ndarray,
    curve_images: int | None,
    seed: int,
    description: dict[str, Any],
) -> EvaluationData:
    """Put the images of the curves first; see `open_evaluation_data`."""
    assert source.labels is not None and source.class_names is not None
    first = curve_images or min(max(len(chosen) // 10, 32), 100)
    leading = stratified_subset(source.labels[chosen], first, seed)
    first = min(first, len(chosen))
    return EvaluationData(
        source=source,
        labels=source.labels,
        class_names=source.class_names,
        indices=np.concatenate([chosen[leading], np.delete(chosen, leading)]),
        curve_images=first,
        description=description | {"images_of_the_curves": first},
    )


def _without_unreadable(source: Source, indices: np.ndarray) -> np.ndarray:
    """The images that can be read, of a run that left out the others; each of those is named."""
    assert isinstance(source, StoredSource)
    images = inspect_images(source, indices, os.cpu_count() or 1, "reading", hidden=True)
    for image in images:
        if image.fault:
            log_once(f"skipped: {image.fault}")
    return indices[[not image.fault for image in images]]


def _of_the_run(
    checkpoint: Path | None, options: DataOptions
) -> tuple[Source, np.ndarray, str, str]:
    """The run's source, which of its images, where they are from, and which part they are."""
    if options.image_column or options.label_column:
        given = "--data.image_column or --data.label_column"
        raise UserError(f"expected --data.name with {given}, found none.")
    recipe = read_recipe(checkpoint, "--data.name")
    name, root = recipe["data"]["name"], recipe["data"]["root"]
    columns, split = recipe_columns(recipe["data"]), options.split
    most = options.max_pixels or recipe["data"].get("max_pixels")
    read = partial(open_source, name, root, columns=columns, max_pixels=most)
    splits = available_splits(name, root, columns)
    if split in splits or split == "train":
        source = read(split)
        return source, np.arange(len(source)), name, f"split {split}"
    if "val" in splits:
        source = read("val")
        return source, np.arange(len(source)), name, f"split val (there is no {split})"
    assert checkpoint is not None  # it has a recipe
    source = read()
    held_out = held_out_images(checkpoint, source)
    if held_out is None or not len(held_out):
        expected = f"{name} images that the run held out from training, or --data.name"
        raise UserError(f"{checkpoint}/data.json: expected {expected}; found none.")
    return source, held_out, name, f"held out from training (there is no {split})"
