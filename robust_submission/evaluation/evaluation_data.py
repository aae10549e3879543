"""Which images a model is evaluated on, and in which order."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.data.run_data import read_recipe, recipe_columns
from robust_submission.data.sources import (
    Columns,
    Source,
    available_splits,
    open_source,
    split_train_validation,
    stratified_subset,
)


@dataclass(kw_only=True)
class DataOptions:
    """The images."""

    name: str | None = None
    """digits, cifar10, svhn, fashion_mnist, folder, hf, challenge or csv (see data/README.md); by
    default the run's own."""
    root: Path | None = None
    """Folder (or manifest) of the data, or its name on the Hugging Face Hub; not needed for
    digits."""
    split: str = "test"
    """train, val or test."""
    download: bool = False
    """Let torchvision download the data set if it is not in root."""
    image_column: str | None = None
    """hf: the column of the images; by default the one of type Image."""
    label_column: str | None = None
    """hf: the column of the labels; by default the one of type ClassLabel."""


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Labelled images in the order in which they are attacked."""

    source: Source
    labels: np.ndarray
    """int64 (N,): the labels of the source."""
    class_names: list[str]
    indices: np.ndarray
    """int64 (n,): which images of the source; the first `curve_images` are for the curves."""
    curve_images: int
    description: dict[str, Any]
    """What the report says of the data."""


def open_evaluation_data(
    options: DataOptions,
    checkpoint: Path | None,
    limit: int | None,
    curve_images: int | None,
    seed: int,
) -> EvaluationData:
    """Open and choose the images.

    Args:
        options: The data; without a name, the test images of the run in `checkpoint`.
        checkpoint: A run folder.
        limit: At most so many images, stratified by class; None takes all.
        curve_images: So many of them, stratified too, come first; None takes a tenth of them, at
            least 32 and at most 100.
        seed: Of both choices.

    Raises:
        UserError: no such data, no labels, a limit below 1, or a root of data without a name.
    """
    if options.name:
        source = open_source(
            options.name,
            options.root,
            options.split,
            download=options.download,
            columns=Columns(image=options.image_column, label=options.label_column),
        )
        candidates, part = np.arange(len(source)), f"split {options.split}"
        origin = options.name if options.root is None else f"{options.name} in {options.root}"
    elif options.root or options.download:
        raise UserError("expected --data.name with --data.root or --data.download, found none.")
    else:
        source, candidates, origin, part = _of_the_run(checkpoint, options.split)
    if source.labels is None or source.class_names is None:
        raise UserError(f"{origin}: expected images with labels, found none.")
    chosen = candidates[stratified_subset(source.labels[candidates], limit, seed)]
    first = curve_images or min(max(len(chosen) // 10, 32), 100)
    leading = stratified_subset(source.labels[chosen], first, seed)
    how = "all" if len(chosen) == len(candidates) else f"a stratified draw with seed {seed}"
    return EvaluationData(
        source=source,
        labels=source.labels,
        class_names=source.class_names,
        indices=np.concatenate([chosen[leading], np.delete(chosen, leading)]),
        curve_images=min(first, len(chosen)),
        description={
            "source": origin,
            "part": part,
            "images": len(chosen),
            "of": len(candidates),
            "chosen": how,
            "images_of_the_curves": min(first, len(chosen)),
        },
    )


def _of_the_run(checkpoint: Path | None, split: str) -> tuple[Source, np.ndarray, str, str]:
    """The run's source, which of its images, where they are from, and which part they are."""
    recipe = read_recipe(checkpoint, "--data.name")
    try:
        data, seed = recipe["data"], recipe["seed"]
        name, root = data["name"], data["root"]
        columns = recipe_columns(data)
        splits = available_splits(name, root, columns)
        if split in splits or split == "train":
            source = open_source(name, root, split, columns=columns)
            return source, np.arange(len(source)), name, f"split {split}"
        if "val" in splits:
            source = open_source(name, root, "val", columns=columns)
            return source, np.arange(len(source)), name, f"split val (there is no {split})"
        # Undivided data: what the run trained on must not be what it is judged on.
        source = open_source(name, root, columns=columns)
        labels = np.zeros(0) if source.labels is None else source.labels
        kept = stratified_subset(labels, data["limit"], seed)
        _, held_out = split_train_validation(labels[kept], data["validation_fraction"], seed)
    except (KeyError, TypeError) as error:
        raise UserError(f"{checkpoint}/recipe.yaml: expected a recipe, found {error}.") from error
    if len(held_out) == 0:
        raise UserError(f"{name}: expected images held out from training, found none.")
    return source, kept[held_out], name, f"held out from training (there is no {split})"
