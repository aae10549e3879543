"""Where images come from: `open_source` for embedded sets, torchvision's, `datasets`', and files.

open_source("digits")                                  embedded, no files needed
open_source("cifar10", Path("data/raw"), download=True)
open_source("folder", Path("data/raw/cifar10"), "test")
open_source("hf", Path("shards"), "test")              Parquet, Arrow or tar files, or the Hub
open_source("npz", Path("generated.npz"))              arrays image and label
open_source("cifar10c", Path("CIFAR-10-C"), "fog/3")   CIFAR-10-C, ImageNet-C
open_source("images", Path("test_images"))             no labels

data/README.md shows each layout.
"""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from robust_submission.cli.documents import read_json, read_yaml, validated
from robust_submission.cli.errors import UserError, log_once
from robust_submission.data.sources.arrays import TORCHVISION_FILES, open_digits, open_torchvision
from robust_submission.data.sources.corrupted import (
    cifar10c_splits,
    imagenetc_splits,
    open_cifar10c,
    open_imagenetc,
)
from robust_submission.data.sources.folders import folder_splits, open_folder, open_images
from robust_submission.data.sources.huggingface import Columns, open_table, table_splits
from robust_submission.data.sources.manifests import manifest_splits, open_challenge, open_csv
from robust_submission.data.sources.mixed import MixedSource, mix_sources
from robust_submission.data.sources.names import SPLITS, match_classes, only_numbers
from robust_submission.data.sources.npz import open_npz
from robust_submission.data.sources.source import (
    RunImages,
    RunRecord,
    Source,
    StoredSource,
    split_train_validation,
    stratified_subset,
)

__all__ = [
    "SOURCES",
    "Columns",
    "MixedSource",
    "Source",
    "StoredSource",
    "available_splits",
    "held_out_images",
    "match_classes",
    "mix_sources",
    "only_numbers",
    "open_run_data",
    "open_source",
    "read_recipe",
    "recipe_columns",
    "split_train_validation",
    "stamps_by_class",
    "stratified_subset",
]

SOURCES = (
    *("digits", *TORCHVISION_FILES, "folder", "hf", "challenge", "csv", "npz"),
    *("cifar10c", "imagenetc", "images"),
)
DOWNLOADS = Path("data/raw")
_CORRUPTED = {"cifar10c": open_cifar10c, "imagenetc": open_imagenetc}


def _checked_root(name: str, root: str | Path | None) -> Path:
    """The folder or file of a source that has one."""
    if name == "shards":
        raise UserError("data.name: expected hf, which reads tar files too, found shards.")
    if name not in SOURCES:
        raise UserError(f"data.name: expected one of {', '.join(SOURCES)}, found {name!r}.")
    if name == "digits" and root is not None:
        raise UserError(f"data.root: expected none with the embedded digits, found {root}.")
    if name not in ("digits", *TORCHVISION_FILES) and root is None:
        raise UserError(f"data.root: expected the place of the source {name}, found none.")
    return Path(root or DOWNLOADS)


def available_splits(
    name: str, root: str | Path | None = None, columns: Columns | None = None
) -> tuple[str, ...]:
    """Which of train, val and test a source is divided into; () where it is not divided.

    Of cifar10c and imagenetc, each kind and severity, such as "fog/3". Arguments and errors are
    those of `open_source`.
    """
    place = _checked_root(name, root)
    if name == "digits" or name in TORCHVISION_FILES:
        return ("train", "test")
    if name == "hf":
        return table_splits(str(place), columns or Columns())
    listed = {
        "folder": folder_splits,
        "cifar10c": cifar10c_splits,
        "imagenetc": imagenetc_splits,
    }
    if name in listed:
        return listed[name](place)
    return manifest_splits(place) if name == "csv" else ()


def open_source(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    *,
    download: bool = False,
    columns: Columns | None = None,
    max_pixels: int | None = None,
) -> StoredSource:
    """Open a data set.

    Args:
        name: digits, cifar10, svhn, fashion_mnist, folder (class folders), hf (what `datasets` of
            Hugging Face reads), challenge (images/ and label.txt), csv (a manifest
            image,label[,split]), npz (arrays image and label), cifar10c, imagenetc or images (no
            labels).
        root: The folder, the manifest's path, or the name on the Hugging Face Hub; digits needs
            none, and torchvision's sets are in data/raw unless it is given.
        split: train, val or test; a source that is not divided gives all of itself for train and
            for test. A kind and severity such as "fog/3" of cifar10c and imagenetc. Without effect
            on images.
        download: Let torchvision fetch its sets when they are missing.
        columns: hf: the images' and the labels'; by default found by their types.
        max_pixels: The largest image that is decoded; None for Pillow's own limit.

    Raises:
        UserError: an unknown name or split, a limit below 1, a root with digits, columns of
            anything but hf, or files that are not as expected.
    """
    if max_pixels is not None:
        if max_pixels < 1:
            raise UserError(f"max_pixels: expected at least 1, found {max_pixels}.")
        source = open_source(name, root, split, download=download, columns=columns)
        return replace(source, max_pixels=max_pixels)
    place = _checked_root(name, root)
    if name != "hf" and columns not in (None, Columns()):
        expected = "data.image_column, data.label_column: expected none but with hf"
        raise UserError(f"{expected}, found one with {name}.")
    if name in _CORRUPTED:
        return _CORRUPTED[name](place, split)
    if split not in SPLITS:
        raise UserError(f"data.split: expected one of {', '.join(SPLITS)}, found {split!r}.")
    if name == "digits":
        return open_digits(split)
    if name in TORCHVISION_FILES:
        return open_torchvision(name, place, split, download=download)
    if name == "hf":
        return open_table(str(place), split, columns or Columns())
    if name == "images":
        return open_images(place)
    openers = {
        "folder": open_folder,
        "challenge": open_challenge,
        "csv": open_csv,
        "npz": open_npz,
    }
    return openers[name](place, split)


def read_recipe(checkpoint: Path | None, otherwise: str) -> dict[str, Any]:
    """The resolved recipe in a run folder; messages name the option to give `otherwise`.

    Raises:
        UserError: there is no recipe.yaml, or it holds no recipe.
    """
    path = checkpoint / "recipe.yaml" if checkpoint else None
    if path is None or not path.is_file():
        place = path or "--checkpoint"
        raise UserError(f"{place}: expected a run's recipe, or {otherwise}; found neither.")
    recipe = read_yaml(path, "a recipe")
    validated(RunRecord, recipe, path)
    return recipe


def recipe_columns(data: Mapping[str, Any]) -> Columns:
    """The columns that a recipe's data names, as `open_source` takes them."""
    return Columns(image=data.get("image_column"), label=data.get("label_column"))


def run_roots(checkpoint: Path) -> list[Path]:
    """Files and folders that the run read its images from: an output may not replace one."""
    data = read_recipe(checkpoint, "--images")["data"]
    extra = data.get("extra") or {}
    return [Path(each["root"]) for each in (data, extra) if each.get("root")]


def stamps_by_class(source: StoredSource, indices: np.ndarray) -> dict[str, dict[str, str]]:
    """Digests of these images' stamps, by class and by id; see `_readable_id`."""
    assert source.labels is not None and source.class_names is not None
    stamps = {name: dict[str, str]() for name in source.class_names}
    for index in indices.tolist():
        of_class = stamps[source.class_names[source.labels[index]]]
        of_class[_readable_id(source, index)] = _stamp(source, index)
    return stamps


def _readable_id(source: StoredSource, index: int) -> str:
    """An image's id as JSON can hold it: bytes that are not UTF-8 are written as \\udcXX."""
    return str(source.ids[index]).encode(errors="backslashreplace").decode()


def _stamp(source: StoredSource, index: int) -> str:
    return blake2b(source.stamp(index), digest_size=4).hexdigest()


def held_out_images(run: Path, source: StoredSource, *, moved: bool = False) -> np.ndarray | None:
    """Sorted indices of the images that a run kept from its training, of data without a split val.

    Found by their ids, so that it does not matter which images were added or removed since then;
    those that are gone are counted in a warning. None if its data.json names none.

    Args:
        run: The run folder.
        source: The data that the run was trained on.
        moved: The data is at another place than it was, and may be other data. Images of other
            stamps are other images; None if fewer than half are there.

    Raises:
        UserError: data.json is damaged, an image is of another class now, or ids are made of
            places and there is another image at one.
    """
    path = run / "data.json"
    if not path.is_file():
        return None
    held_out = validated(RunImages, read_json(path, "a run's images"), path).held_out
    if held_out is None:
        return None
    assert source.labels is not None and source.class_names is not None
    known = {each: (name, stamp) for name, ids in held_out.items() for each, stamp in ids.items()}
    found = list[int]()
    for index, label in enumerate(source.labels.tolist()):
        each, now = _readable_id(source, index), source.class_names[label]
        if each not in known:
            continue
        name, stamp = known[each]
        same = stamp == _stamp(source, index)
        if moved and not (same and name == now):
            continue
        if name != now or (source.numbered and not same):
            expected = f"{each}, which was held out, of the class {name} as before"
            other = now if name != now else "another image of that number"
            raise UserError(f"{path}: expected {expected}, found {other}: the data has changed.")
        found.append(index)
    if moved and 2 * len(found) < len(known):
        return None
    if gone := len(known) - len(found):
        log_once(f"{path}: {gone} of {len(known)} images that were held out are not there now.")
    return np.array(found, dtype=np.int64)


def open_run_data(checkpoint: Path, split: str, max_pixels: int | None = None) -> Source:
    """One split of the data that the run was trained on, with the run's limit if none is given.

    Raises:
        UserError: no recipe, or its data has no such split.
    """
    data = read_recipe(checkpoint, "--images")["data"]
    name, root, columns = data["name"], data["root"], recipe_columns(data)
    if split not in ("train", *available_splits(name, root, columns)):
        expected = f"data with {split} images, or --images"
        raise UserError(f"{checkpoint}: expected {expected}; found none.")
    if max_pixels is None:
        max_pixels = data.get("max_pixels")
    return open_source(name, root, split, columns=columns, max_pixels=max_pixels)
