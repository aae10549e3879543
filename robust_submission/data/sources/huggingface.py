"""Data sets of Hugging Face's `datasets`: Parquet, Arrow or tar files in a folder, or on the Hub.

They are memory-mapped and read by index, so that order, workers, processes and resuming are those
of every other source, and the data may be larger than memory. The images stay undecoded until
`decode_image` reads them. What is not Arrow is converted to it once, in the cache of `datasets`
(HF_DATASETS_CACHE). Nothing asks the network for a local folder, or where HF_HUB_OFFLINE is set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robust_submission.cli.errors import UserError, log_once
from robust_submission.data.images import read_bytes
from robust_submission.data.sources.folders import list_files
from robust_submission.data.sources.names import (
    name_splits,
    number_labels,
    say_left_out,
    shortened,
)
from robust_submission.data.sources.source import StoredSource

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns hold the images and the labels; None finds them by their features' types."""

    image: str | None = None
    """By default the one column of type Image."""
    label: str | None = None
    """By default the one column of type ClassLabel; integers or strings will do if named."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TableSource(StoredSource):
    """Images in the rows of a table; an image's id is its file name, or its row if not unique."""

    dataset: "datasets.Dataset"
    """Its only column is the images', undecoded: {"bytes": …, "path": …}."""
    rows: np.ndarray
    """int64 (N,): each image's row."""
    origin: str
    """The data set and its split, for messages."""
    sizes: np.ndarray
    """int64 (N,): bytes of each image; 0 where the row only names a file."""

    def stamp(self, index: int) -> bytes:
        return b"%d" % self.sizes[index]

    def content(self, index: int) -> bytes:
        (cell,) = self.dataset[int(self.rows[index])].values()
        return read_bytes(Path(cell["path"])) if cell["bytes"] is None else cell["bytes"]

    def place(self, index: int) -> str:
        return f"{self.origin}: row {self.rows[index]} ({self.ids[index]})"


def _is_saved(root: str) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((Path(root) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _load_splits(root: str) -> "dict[str, datasets.Dataset]":
    """The splits by their names."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        load = datasets.load_from_disk if _is_saved(root) else datasets.load_dataset
        found = load(root)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        expected = "a folder of Parquet, Arrow or tar files, or the name of a data set on the Hub"
        raise UserError(f"{root}: expected {expected}, found none: {reason}") from error
    if isinstance(found, datasets.Dataset):
        return {"train": found}
    assert isinstance(found, datasets.DatasetDict)
    return {str(name): split for name, split in found.items()}


def table_files(root: str) -> set[str]:
    """Absolute paths of the files that `datasets` reads in a folder; empty for a saved one."""
    import datasets

    if _is_saved(root):
        return set()
    files = datasets.load_dataset_builder(root).config.data_files or {}
    return {str(path) for paths in files.values() for path in paths}


def _ignored_files(root: str) -> list[str]:
    """Files in a folder like those that `datasets` reads there, but that it does not read."""
    if not Path(root).is_dir():
        return []
    read = table_files(root)
    endings = {Path(each).suffix for each in read}
    paths = [Path(root, name) for name in list_files(Path(root))]
    alike = [path for path in paths if path.suffix in endings]
    return [str(path) for path in alike if not {str(path), str(path.resolve())} & read]


def _find_column(root: str, features: "datasets.Features", what: str, named: str | None) -> str:
    """The column named by the option, else the only one of the feature type `what`."""
    option = "image_column" if what == "Image" else "label_column"
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    fitting = [each for each, kind in kinds.items() if (each == named if named else kind == what)]
    if len(fitting) == 1:
        return fitting[0]
    expected = f"the column {named}" if named else f"one column of type {what}"
    found = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    raise UserError(f"{root}: expected {expected}, found {found}; see --data.{option}.")


def _read_words(root: str, dataset: "datasets.Dataset", column: str) -> list[str | None]:
    """Each row's label as text: a class's name, or a number; None where it has none."""
    import datasets

    if column not in dataset.features:
        return [None] * len(dataset)
    feature, values = dataset.features[column], dataset.data.column(column).to_pylist()
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return [value if value and value.strip() else None for value in values]
    integral = isinstance(feature, datasets.Value) and "int" in feature.dtype
    if not integral and not isinstance(feature, datasets.ClassLabel):
        expected = f"a ClassLabel, integers or strings in the column {column}"
        raise UserError(f"{root}: expected {expected}, found {feature}.")
    return [None if value is None or value < 0 else str(value) for value in values]


def _read_labels(
    root: str, splits: "dict[str, datasets.Dataset]", named: str | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Labels by split, int64 (N,), -1 where a row has none; and the class names, of all splits."""
    features = next(iter(splits.values())).features
    column = _find_column(root, features, "ClassLabel", named)
    kinds = {
        tuple(getattr(dataset.features[column], "names", None) or ())
        for dataset in splits.values()
        if column in dataset.features
    }
    if len(kinds) > 1:
        found = " and ".join(shortened(each) or "no names" for each in sorted(kinds))
        raise UserError(f"{root}: expected the same class names in each split, found {found}.")
    words = {split: _read_words(root, dataset, column) for split, dataset in splits.items()}
    known = {word for each in words.values() for word in each if word is not None}
    if not known:
        raise UserError(f"{root}: expected labels in the column {column}, found none.")
    numbers, classes = number_labels(known)
    labels = {
        split: np.array([-1 if word is None else numbers[word] for word in each], dtype=np.int64)
        for split, each in words.items()
    }
    return labels, getattr(features[column], "names", None) or classes


def _select_images(root: str, dataset: "datasets.Dataset", named: str | None) -> "datasets.Dataset":
    """The column of the images alone, undecoded."""
    import datasets

    images = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if "__key__" in dataset.features and any("." in name for name in images):
        kind = f"{images[0]} is taken for its kind"
        log_once(f"{root}: a sample's name in a tar file ends at its first dot; {kind}.")
    column = _find_column(root, dataset.features, "Image", named)
    others = [name for name in images if name != column]
    say_left_out(root, others, "columns of images (see data.image_column)")
    try:
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # among them pyarrow's
        found = f"found {dataset.features[column]}"
        raise UserError(f"{root}: expected images in the column {column}, {found}.") from error


def table_splits(root: str, columns: Columns) -> tuple[str, ...]:
    """Which of train, val and test there are; a split in which no row has a label is left out."""
    splits = _load_splits(root)
    labels, _ = _read_labels(root, splits, columns.label)
    return tuple(
        ours for ours, name in name_splits(root, splits).items() if (labels[name] >= 0).any()
    )


def open_table(root: str, split: str, columns: Columns) -> TableSource:
    """A data set that `datasets` loads, or that it saved with `save_to_disk`.

    Labels are a column of ClassLabel or, if named, of integers taken as written or of class names
    in string order. Rows without an image or a label are left out, and named in a warning.

    Args:
        root: A folder, or the data set's name on the Hub.
        split: train, val (called validation there) or test.
        columns: The images' and the labels'.

    Raises:
        UserError: no such data set, split or column, or no row that can be used.
    """
    from pyarrow.compute import call_function

    splits = _load_splits(root)
    names = name_splits(root, splits)
    others = [name for name in splits if name not in names.values()]
    say_left_out(root, others, "names that are no split")
    say_left_out(root, _ignored_files(root), "files that `datasets` does not read")
    if split not in names:
        raise UserError(f"{root}: expected the split {split}, found only {', '.join(splits)}.")
    all_labels, classes = _read_labels(root, splits, columns.label)
    labels = all_labels[names[split]]
    images = _select_images(root, splits[names[split]], columns.image)
    contents, paths = images.data.column(0).flatten()
    missing = contents.is_null().to_numpy() & paths.is_null().to_numpy()
    unlabelled = ~missing & (labels < 0)
    origin = f"{root}: {names[split]}"
    rows = np.flatnonzero(~missing & ~unlabelled)
    if len(rows) == 0:
        raise UserError(f"{origin}: expected images with labels, found none in {len(labels)} rows.")
    names = _own_names(paths.to_pylist(), rows)
    return TableSource(
        ids=np.array(names or [f"{row:05d}.png" for row in rows]),
        numbered=names is None,
        labels=labels[rows],
        class_names=classes,
        left_out=_report(origin, {"without an image": missing, "without a label": unlabelled}),
        dataset=images,
        rows=rows,
        origin=origin,
        sizes=call_function("binary_length", [contents]).fill_null(0).to_numpy()[rows],
    )


def _report(origin: str, faults: dict[str, np.ndarray]) -> list[str]:
    """The rows that have a fault; a warning names the first of them."""
    found = [f"row {row}: {fault}" for fault, of in faults.items() for row in np.flatnonzero(of)]
    say_left_out(origin, found, "samples that cannot be used")
    return found


def _own_names(paths: Sequence[str | None], rows: np.ndarray) -> list[str] | None:
    """The rows' file names, where each has one of its own."""
    names = [Path(path).name if (path := paths[row]) else "" for row in rows]
    return names if "" not in names and len(set(names)) == len(names) else None
