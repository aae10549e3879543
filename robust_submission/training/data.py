"""The images of a run: builds the loaders of one process from a recipe."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from robust_submission.cli.errors import UserError, log, log_once
from robust_submission.data.augment import Augmentation
from robust_submission.data.dataset import ImageDataset
from robust_submission.data.inspection import inspect_images
from robust_submission.data.loader import EvaluationLoader, TrainingLoader, micro_batch_size
from robust_submission.data.sources import (
    Columns,
    StoredSource,
    available_splits,
    held_out_images,
    mix_sources,
    open_source,
    read_recipe,
    split_train_validation,
    stamps_by_class,
    stratified_subset,
)
from robust_submission.training.recipe import DataConfig, ExtraConfig, RunRecipe, require
from robust_submission.training.teacher import label_images

Part = tuple[StoredSource, np.ndarray]
"""A source, and which of its images."""
SHOWN_FAULTS = 5


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The loaders of one process; `test` is None if the source has no test images."""

    class_names: list[str]
    train: TrainingLoader
    validation: EvaluationLoader
    test: EvaluationLoader | None
    held_out: Mapping[str, Mapping[str, str]] | None
    """All images that training leaves for validation and for later evaluations, as
    `stamps_by_class` returns them; None where the data has a split val."""

    def identity(self) -> dict[str, Any]:
        """What must be the same when resuming: the classes, and the images of each.

        With the images that were held out, which evaluations and later runs read.
        """
        names = {str(label): name for label, name in enumerate(self.class_names)}
        images = {"train": digest_classes(self.train.dataset)}
        images["val"] = digest_classes(self.validation.dataset)
        count = len(self.train.dataset)
        identity = {"training_images": count, "class_names": names, "images": images}
        return identity | {"held_out": self.held_out}


def load_data(recipe: RunRecipe, image_size: int, accelerator: Accelerator) -> TrainingData:
    """Load this process's training, validation and test images.

    The validation images are the source's own split val; or else those that the runs held out which
    this one continues or starts from, or a stratified share of the training images. The test images
    are never used to choose anything.

    Raises:
        UserError: There is no such data, it has no labels, fewer than two classes or no validation
            images, the extra images have other classes or no share of a batch, or the processes
            cannot share a batch evenly; or a checked image is unreadable.
    """
    config, share = recipe.data, accelerator.num_processes * recipe.gradient_accumulation
    expected = f"a multiple of processes x gradient_accumulation = {share}"
    require(recipe.batch_size % share == 0, "batch_size", expected, recipe.batch_size)
    columns = Columns(image=config.image_column, label=config.label_column)
    split = partial(
        open_source,
        config.name,
        config.root,
        download=config.download,
        columns=columns,
        max_pixels=config.max_pixels,
    )
    with accelerator.main_process_first():  # one process downloads
        source = split("train")
        splits = available_splits(config.name, config.root, columns)
        validation, test = (split(name) if name in splits else None for name in ("val", "test"))
        extra = _open_extra(config.extra, config.max_pixels) if config.extra else None
    parts, held_out = _choose_images(recipe, source, validation)
    if test is not None:
        parts["test"] = _all_of(test)
    if extra is not None:
        parts["extra"] = _all_of(extra)
    if config.check or config.skip_bad:
        parts = _readable_parts(config, accelerator, parts)
    assert source.class_names is not None  # it has labels
    if config.extra:
        extra = _labelled(config, accelerator, *parts["extra"], source.class_names)
        parts["train"] = _mix_parts(config.extra, parts["train"], extra)
    evaluation = partial(_evaluation_loader, recipe, image_size, accelerator)
    return TrainingData(
        class_names=source.class_names,
        train=_training_loader(recipe, image_size, accelerator, *parts["train"]),
        validation=evaluation(*parts["val"]),
        test=evaluation(*parts["test"]) if "test" in parts else None,
        held_out=stamps_by_class(source, held_out) if validation is None else None,
    )


def _open_extra(config: ExtraConfig, max_pixels: int | None) -> StoredSource:
    return open_source(
        config.name,
        config.root,
        download=config.download,
        columns=Columns(image=config.image_column, label=config.label_column),
        max_pixels=config.max_pixels or max_pixels,
    )


def _choose_images(
    recipe: RunRecipe, source: StoredSource, validation: StoredSource | None
) -> tuple[dict[str, Part], np.ndarray]:
    """Which images to train and to validate on, and which of the source's own are held out."""
    config = recipe.data
    if source.labels is None or source.class_names is None:
        raise UserError(f"data.name: expected a source with labels, found {config.name}.")
    names = [source.class_names[label] for label in np.unique(source.labels).tolist()]
    require(len(names) >= 2, "data", "images of at least two classes", ", ".join(names))
    fraction = 0 if validation is not None else config.validation_fraction
    expected = "above 0 for data without a split val"
    require(validation is not None or fraction != 0, "data.validation_fraction", expected, 0)
    chosen = stratified_subset(source.labels, config.limit, recipe.seed)
    kept, held_out = (
        chosen[part]
        for part in split_train_validation(source.labels[chosen], fraction, recipe.seed)
    )
    before = _held_out_before(recipe, source) if validation is None else None
    if before is not None and not np.array_equal(before, held_out):
        log_once(f"data: validates on {len(before)} images that the former runs held out, too.")
        kept, held_out = chosen[~np.isin(chosen, before)], before
        expected = "images to train on, and others that all former runs held out"
        require(min(len(kept), len(held_out)) > 0, "data", expected, "none")
    places = np.arange(len(validation)) if validation is not None else held_out
    validation = source if validation is None else validation
    assert validation.labels is not None
    some = stratified_subset(validation.labels[places], config.validation_limit, recipe.seed)
    return {"train": (source, kept), "val": (validation, places[some])}, held_out


def _held_out_before(recipe: RunRecipe, source: StoredSource) -> np.ndarray | None:
    """Which images all the runs have held out that this one continues, or starts from.

    Only those of the same data count, which may have moved; None if there is none, or none says.
    """
    if recipe.resume:
        return held_out_images(recipe.output, source)
    runs = [each for each in recipe.starts if each and (each / "recipe.yaml").is_file()]
    here, known = _place(recipe.data.name, recipe.data.root), list[np.ndarray]()
    for run in runs:
        data = read_recipe(run, "the recipe of a run")["data"]
        moved = _place(data["name"], data["root"]) != here
        found = held_out_images(run, source, moved=moved)
        if found is not None:
            known.append(found)
        elif moved:
            log_once(f"data: holds out anew: what {run} held out is not among these images.")
    return reduce(np.intersect1d, known) if known else None


def _place(name: str, root: Path | str | None) -> tuple[str, Path | None]:
    return name, None if root is None else Path(root).resolve()


def _all_of(source: StoredSource) -> Part:
    return source, np.arange(len(source))


def _labelled(
    config: DataConfig,
    accelerator: Accelerator,
    source: StoredSource,
    indices: np.ndarray,
    class_names: list[str],
) -> Part:
    """Extra images with labels of their own, or with the teacher's.

    Raises:
        UserError: They have none and there is no teacher, or both; see also `label_images`.
    """
    assert config.extra is not None
    root, teacher = config.extra.root, config.extra.teacher
    if source.labels is None:
        expected = "images with labels, or data.extra.teacher to label them"
        require(teacher is not None, "data.extra.root", expected, f"{root} without")
        assert teacher is not None
        workers = config.num_workers
        return label_images(source, indices, teacher, class_names, accelerator, workers), indices
    expected = f"none, as the images in {root} have labels"
    require(teacher is None, "data.extra.teacher", expected, teacher)
    return source, indices


def _mix_parts(config: ExtraConfig, base: Part, extra: Part) -> Part:
    """The images of both, base first."""
    (base_source, base_indices), (extra_source, extra_indices) = base, extra
    mixed = mix_sources(base_source, extra_source, config.fraction, config.root)
    return mixed, np.concatenate([base_indices, len(base_source) + extra_indices])


def digest_classes(dataset: ImageDataset) -> dict[str, str]:
    """A digest of the names and sizes of each class's images, by the class's name.

    Not of times: a copy of the data on another machine is the same data.
    """
    source = dataset.source
    assert isinstance(source, StoredSource) and source.labels is not None and source.class_names
    digests = {name: blake2b(digest_size=8) for name in source.class_names}
    for index in dataset.indices.tolist():
        name = str(source.ids[index]).encode(errors="surrogateescape")
        digests[source.class_names[source.labels[index]]].update(name + source.stamp(index))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _readable_parts(
    config: DataConfig, accelerator: Accelerator, parts: dict[str, Part]
) -> dict[str, Part]:
    """The images of each part that can be read, after a look at all of them.

    Raises:
        UserError: One cannot be read, unless such images are to be skipped; or none can.
    """
    rank, count = accelerator.process_index, accelerator.num_processes
    workers = config.num_workers or max((os.cpu_count() or 1) // count, 1)
    faults, readable = list[str](), dict[str, Part]()
    for name, (source, indices) in parts.items():
        mine = indices[rank::count]
        images = inspect_images(source, mine, workers, name, hidden=rank > 0)
        found = [
            (index, image.fault)
            for index, image in zip(mine.tolist(), images, strict=True)
            if image.fault
        ]
        bad = dict(sorted(gather_object(found)))
        faults += bad.values()
        kept = indices[~np.isin(indices, list(bad))]
        require(len(kept) > 0, "data", f"a readable {name} image", f"none of {len(indices)}")
        readable[name] = (source, kept)
    if faults and not config.skip_bad:
        shown = [
            *faults[:SHOWN_FAULTS],
            f"{len(faults)} images cannot be read; data.skip_bad leaves them out.",
        ]
        raise UserError("\n".join(shown))
    for fault in faults if accelerator.is_main_process else ():
        log.warning("skipped: %s", fault)
    return readable


def _training_loader(
    recipe: RunRecipe,
    size: int,
    accelerator: Accelerator,
    source: StoredSource,
    indices: np.ndarray,
) -> TrainingLoader:
    config = recipe.data
    augmentation = Augmentation(
        name=config.augmentation,
        image_size=size,
        flip=config.flip,
        policy=config.policy,
        erasing=config.erasing,
    )
    source = replace(source, least_side=augmentation.least_side)
    return TrainingLoader(
        ImageDataset(source, indices, size, augmentation, seed=recipe.seed),
        batch_size=recipe.batch_size,
        num_workers=config.num_workers,
        seed=recipe.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def _evaluation_loader(
    recipe: RunRecipe,
    size: int,
    accelerator: Accelerator,
    source: StoredSource,
    indices: np.ndarray,
) -> EvaluationLoader:
    return EvaluationLoader(
        ImageDataset(source, indices, size),
        batch_size=micro_batch_size(size),
        num_workers=recipe.data.num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
