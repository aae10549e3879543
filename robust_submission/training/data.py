"""The images of a run: builds the loaders of one process from a recipe."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from accelerate import Accelerator

from robust_submission.cli.errors import UserError
from robust_submission.data.augment import Augmentation
from robust_submission.data.dataset import ImageDataset
from robust_submission.data.loader import EvaluationLoader, TrainingLoader, micro_batch_size
from robust_submission.data.sources import (
    Columns,
    Source,
    available_splits,
    open_source,
    split_train_validation,
    stratified_subset,
)
from robust_submission.training.recipe import RunRecipe, require


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The loaders of one process; `test` is None if the source has no test images."""

    class_names: list[str]
    train: TrainingLoader
    validation: EvaluationLoader
    test: EvaluationLoader | None

    def identity(self) -> dict[str, Any]:
        """The classes and the number of training images, which must be the same when resuming."""
        names = {str(label): name for label, name in enumerate(self.class_names)}
        return {"training_images": len(self.train.dataset), "class_names": names}


def load_data(recipe: RunRecipe, image_size: int, accelerator: Accelerator) -> TrainingData:
    """Load this process's training, validation and test images.

    The validation images are the source's own split val, or else a stratified share of the training
    images; the test images are never used to choose anything.

    Raises:
        UserError: There is no such data, it has no labels or no validation images, or the
            processes cannot share a batch evenly.
    """
    config, parts = recipe.data, accelerator.num_processes * recipe.gradient_accumulation
    expected = f"a multiple of processes x gradient_accumulation = {parts}"
    require(recipe.batch_size % parts == 0, "batch_size", expected, recipe.batch_size)
    columns = Columns(image=config.image_column, label=config.label_column)
    split = partial(
        open_source, config.name, config.root, download=config.download, columns=columns
    )
    with accelerator.main_process_first():  # one process downloads
        source = split("train")
    if source.labels is None or source.class_names is None:
        raise UserError(f"data.name: expected a source with labels, found {config.name}.")
    splits = available_splits(config.name, config.root, columns)
    fraction = 0 if "val" in splits else config.validation_fraction
    expected = "above 0 for data without a split val"
    require("val" in splits or fraction != 0, "data.validation_fraction", expected, 0)
    chosen = stratified_subset(source.labels, config.limit, recipe.seed)
    kept, held_out = split_train_validation(source.labels[chosen], fraction, recipe.seed)
    validation = split("val") if "val" in splits else source
    assert validation.labels is not None
    places = np.arange(len(validation)) if "val" in splits else chosen[held_out]
    some = stratified_subset(validation.labels[places], config.validation_limit, recipe.seed)
    evaluation = partial(_evaluation_loader, recipe, image_size, accelerator)
    return TrainingData(
        class_names=source.class_names,
        train=_training_loader(recipe, image_size, accelerator, source, chosen[kept]),
        validation=evaluation(validation, places[some]),
        test=evaluation(split("test"), None) if "test" in splits else None,
    )


def _training_loader(
    recipe: RunRecipe, size: int, accelerator: Accelerator, source: Source, indices: np.ndarray
) -> TrainingLoader:
    config = recipe.data
    augmentation = Augmentation(name=config.augmentation, image_size=size, flip=config.flip)
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
    source: Source,
    indices: np.ndarray | None,
) -> EvaluationLoader:
    return EvaluationLoader(
        ImageDataset(source, indices, size),
        batch_size=micro_batch_size(size),
        num_workers=recipe.data.num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
