"""Parquet, Arrow and tar files through `datasets`: read like the same files in folders."""

import io
import logging
import tarfile
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from robust_submission.data.dataset import Batch, ImageDataset
from robust_submission.data.inspection import inspect_data
from robust_submission.data.loader import EvaluationLoader, TrainingLoader
from robust_submission.data.sources import Columns, available_splits, open_source
from tests.conftest import ROOT

CIFAR10 = ROOT.parent / "shared/data/cifar10-jpeg.tar.gz"
CLASSES = ["airplane", "automobile", "bird"]
FEATURES = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
TAR = Columns(label="cls")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted files go to a folder of the test, and nothing asks the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files, 24 of each class in train/ and 4 in test/; CIFAR-10's where they are at hand."""
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, first, last in (("train", 0, 24), ("test", 24, 28)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(first, last):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:04d}.jpg")
    if CIFAR10.is_file():
        with tarfile.open(CIFAR10) as tar:
            for member in takewhile(lambda member: "cat" not in member.name, tar):
                for path in root.glob(f"*/{member.name.removeprefix('train/')}"):
                    if file := tar.extractfile(member):
                        path.write_bytes(file.read())
    return root


def rows_of(folder: Path) -> dict[str, list[Any]]:
    files = sorted(folder.glob("*/*.jpg"))
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    return {"image": images, "label": [CLASSES.index(file.parent.name) for file in files]}


def tables(folder: Path) -> dict[str, datasets.Dataset]:
    return {
        split: datasets.Dataset.from_dict(rows_of(folder / split), features=FEATURES)
        for split in ("train", "test")
    }


def write_parquet(folder: Path, root: Path) -> None:
    """The images of each split in shards of at most 36 rows."""
    for split, table in tables(folder).items():
        count = -(-len(table) // 36)
        for shard in range(count):
            name = f"{split}-{shard:05d}-of-{count:05d}.parquet"
            table.shard(count, shard, contiguous=True).to_parquet(root / name)


def write_arrow(folder: Path, root: Path) -> None:
    """As `save_to_disk` writes them."""
    datasets.DatasetDict(tables(folder)).save_to_disk(root)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def write_tars(folder: Path, root: Path) -> None:
    """The same in WebDataset's format: shards of 10 images, each with its .cls."""
    for split in ("train", "test"):
        members = list[tuple[str, bytes]]()
        for index, (image, label) in enumerate(zip(*rows_of(folder / split).values(), strict=True)):
            members += [(f"{index:03d}.jpg", image["bytes"]), (f"{index:03d}.cls", b"%d" % label)]
        for shard in range(0, len(members), 20):
            write_tar(root / split / f"{shard // 20:02d}.tar", members[shard : shard + 20])


@pytest.mark.parametrize(
    ("write", "columns", "classes"),
    [
        (write_parquet, None, CLASSES),
        (write_arrow, None, CLASSES),
        (write_tars, TAR, ["0", "1", "2"]),
    ],
)
def test_equals_the_folder_image_by_image(
    folder: Path, tmp_path: Path, write: Any, columns: Columns | None, classes: list[str]
) -> None:
    write(folder, tmp_path)
    assert available_splits("hf", tmp_path, columns) == ("train", "test")
    for split in ("train", "test"):
        ours = open_source("hf", tmp_path, split, columns=columns)
        files = open_source("folder", folder, split)
        assert len(ours) == len(files) and len(set(ours.ids)) == len(ours)
        assert np.array_equal(ours.labels, files.labels)  # type: ignore[arg-type]
        assert ours.class_names == classes and not ours.left_out
        for index in range(len(ours)):
            assert ours.content(index) == files.content(index)
            assert np.array_equal(ours.image(index), files.image(index))
    with pytest.raises(ValueError, match=f"^{tmp_path}: expected the split val, found only train"):
        open_source("hf", tmp_path, "val", columns=columns)


def bytes_of(batch: Batch) -> bytes:
    return b"".join(batch[name].numpy().tobytes() for name in ("images", "labels", "indices"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_no_batch(folder: Path, tmp_path: Path, method: str) -> None:
    write_parquet(folder, tmp_path)
    batches = list[list[bytes]]()
    for name, root, workers in (("folder", folder, 0), ("hf", tmp_path, 0), ("hf", tmp_path, 2)):
        dataset = ImageDataset(open_source(name, root), None, 24)
        loader = TrainingLoader(dataset, batch_size=16, num_workers=workers, seed=0)
        loader._loader.multiprocessing_context = method if workers else None
        dataset.source.image(0)  # an image read before the workers start
        loader.set_epoch(3)
        batches.append([bytes_of(batch) for batch in loader])
    assert batches[0] == batches[1] == batches[2]
    assert len(batches[0]) == 72 // 16


def picture(level: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (2, 2), level).save(content, "PNG")
    return content.getvalue()


def saved(root: Path, features: datasets.Features | None = None, **columns: Any) -> Path:
    datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "train.parquet")
    return root


def cells(count: int) -> list[dict[str, Any]]:
    return [{"bytes": picture(10 * index), "path": None} for index in range(count)]


def test_samples_without_image_or_label_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [*cells(4), None, None, {"bytes": b"x", "path": "bad.png"}]
    root = saved(tmp_path, FEATURES, image=images, label=[2, None, -1, 1, 0, None, 1])
    with caplog.at_level(logging.WARNING, logger="robust_submission"):
        source = open_source("hf", root)
    left_out = [
        *("row 4: without an image", "row 5: without an image"),
        *("row 1: without a label", "row 2: without a label"),
    ]
    assert list(source.left_out) == left_out
    said = f"{root}: train: 4 left out, samples that cannot be used: "
    assert caplog.messages == [said + "; ".join(left_out) + "."]
    assert source.labels is not None and source.labels.tolist() == [2, 1, 1]
    assert source.ids.tolist() == ["00000.png", "00003.png", "00006.png"]
    assert [int(source.image(index)[0, 0, 0]) for index in (0, 1)] == [0, 30]
    with pytest.raises(ValueError, match=r"train: row 6 \(00006.png\): expected an image \(JPEG"):
        source.image(2)
    dataset = ImageDataset(source, None, 2, skip_bad=True)
    (batch,) = EvaluationLoader(dataset, batch_size=4, num_workers=0)
    assert [skipped.index for skipped in batch["skipped"]] == [2]


def test_a_tar_sample_without_its_label_is_named(tmp_path: Path) -> None:
    members = [(f"{index}.png", picture(index)) for index in range(6)]
    members += [(f"{index}.cls", b"3") for index in range(6)]
    order = sorted(members, key=lambda member: member[0][0])
    write_tar(tmp_path / "0.tar", [*order, ("6.png", picture(6))])
    source = open_source("hf", tmp_path, columns=TAR)
    assert len(source) == 6 and list(source.left_out) == ["row 6: without a label"]
    assert source.class_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("names", "column", "said"),
    [
        ([f"{n:02d}.v1.0" for n in range(12)], None, []),
        (
            [f"{n:02d}.v{1 + n // 6}.0" for n in range(12)],
            "v1.0.png",
            ["6 left out, samples that cannot be used: row 6: without an image; "],
        ),
        (
            [f"{n // 2:02d}.v{1 + n % 2}.0" for n in range(12)],
            "v1.0.png",
            ["1 left out, columns of images (see data.image_column): v2.0.png."],
        ),
    ],
)
def test_samples_with_dots_in_their_names_do_not_vanish(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    names: list[str],
    column: str | None,
    said: list[str],
) -> None:
    members = list[tuple[str, bytes]]()
    for level, name in enumerate(names):
        members += [(f"{name}.png", picture(level)), (f"{name}.cls", b"%d" % (level % 2))]
    write_tar(tmp_path / "0.tar", members)
    source = open_source("hf", tmp_path, columns=Columns(image=column, label="v1.0.cls"))
    assert len(source) == (6 if said else 12)
    assert "ends at its first dot" in caplog.messages[0]
    for message, text in zip(caplog.messages[1:], said, strict=True):
        assert text in message


def test_files_that_datasets_ignores_are_said_when_training(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data := tmp_path / "data").mkdir()
    write_parquet(folder, data)
    (tmp_path / "notes.txt").touch()
    stray = (data / "test-00000-of-00001.parquet").rename(data / "test.parquet")
    assert len(open_source("hf", tmp_path)) == 72
    assert caplog.messages == [
        f"{tmp_path}: 1 left out, files that `datasets` does not read: {stray}."
    ]


def test_columns_of_other_types_by_their_names(tmp_path: Path) -> None:
    contents = [picture(level) for level in (1, 2, 3)]
    root = saved(tmp_path, png=contents, animal=["dog", "cat", "dog"], number=[7, 0, 2])
    for column, classes, labels in (
        ("animal", ["cat", "dog"], [1, 0, 1]),
        ("number", [str(label) for label in range(8)], [7, 0, 2]),
    ):
        source = open_source("hf", root, columns=Columns(image="png", label=column))
        assert source.labels is not None
        assert (source.class_names, source.labels.tolist()) == (classes, labels)
        assert [int(source.image(index)[0, 0, 0]) for index in range(3)] == [1, 2, 3]


def test_class_folders_through_datasets_stay_files(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(picture(5))
    source = open_source("hf", tmp_path)
    assert source.class_names == ["a", "b"] and source.ids.tolist() == ["1.png", "2.png"]
    assert (source.image(0) == 5).all()
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png: expected an image file, found nothing there"):
        source.image(0)


def test_a_split_without_labels_is_not_there_to_test_on(tmp_path: Path) -> None:
    """As on the Hub, where contests publish test images with the label -1."""
    for split, labels in (("train", [0, 1]), ("validation", [1, 1]), ("test", [-1, -1])):
        table = datasets.Dataset.from_dict({"image": cells(2), "label": labels}, features=FEATURES)
        table.to_parquet(tmp_path / f"{split}.parquet")
    assert available_splits("hf", tmp_path) == ("train", "val")
    validation = open_source("hf", tmp_path, "val")
    assert validation.labels is not None and validation.labels.tolist() == [1, 1]
    with pytest.raises(ValueError, match="test: expected images with labels, found none in 2 rows"):
        open_source("hf", tmp_path, "test")


def test_files_that_datasets_ignores_are_named(folder: Path, tmp_path: Path) -> None:
    """It takes one way of naming splits for all files, and passes over the others."""
    (data := tmp_path / "data").mkdir()
    write_parquet(folder, data)
    stray = (data / "test-00000-of-00001.parquet").rename(data / "test.parquet")
    inspection = inspect_data("hf", tmp_path, workers=1)
    assert [*inspection.splits] == ["train"] and not inspection.faults()
    assert inspection.left_out() == [f"{stray}: not a data file to `datasets`"]
    assert inspection.class_counts("train") == dict.fromkeys(CLASSES, 24)
    assert inspection.sizes("train") == {(32, 32): 72} and not inspection.repeated()


TWO = {"image": cells(2), "other": cells(2), "label": [0, 1], "name": ["a", "b"]}
IMAGES = {"image": datasets.Image(), "other": datasets.Image()}
TYPES = datasets.Features(**IMAGES, label=datasets.Value("int64"), name=datasets.Value("string"))


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (None, "label", r"expected one column of type Image, found image \(Image\), other"),
        ("image", None, r"one column of type ClassLabel, .*label \(Value\).*data.label_column"),
        ("pixels", "label", r"the column pixels, found .*data.image_column"),
        ("image", "other", "expected a ClassLabel, integers or .* column oth"),
        ("label", "label", "expected images in the column label, found"),
    ],
)
def test_columns_that_do_not_fit(
    tmp_path: Path, image: str | None, label: str | None, message: str
) -> None:
    root = saved(tmp_path, TYPES, **TWO)
    with pytest.raises(ValueError, match=f"^{root}: .*{message}"):
        open_source("hf", root, columns=Columns(image=image, label=label))


def test_an_empty_name_is_no_label(tmp_path: Path) -> None:
    root = saved(tmp_path, TYPES, **(TWO | {"name": ["", "b"]}))
    source = open_source("hf", root, columns=Columns(image="image", label="name"))
    assert source.class_names == ["b"] and len(source) == 1


def test_splits_number_their_classes_alike(tmp_path: Path) -> None:
    splits = {}
    for split, names in (("train", ["cat", "dog", "owl"]), ("test", ["cat", "owl"])):
        types = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        rows = {"image": cells(2), "label": [0, 1]}
        splits[split] = datasets.Dataset.from_dict(rows, features=types)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = "the same class names in each split, found cat, dog, owl and cat, owl"
    with pytest.raises(ValueError, match=found):
        open_source("hf", tmp_path / "saved")


def test_data_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1 is how it begins")
    for root in (tmp_path / "empty", tmp_path / "bad", Path("nobody/nothing")):
        with pytest.raises(ValueError, match=f"^{root}: expected a folder of Parquet, .* Hub, fou"):
            open_source("hf", root)
    with pytest.raises(ValueError, match="expected hf, which reads tar files too, found sh"):
        open_source("shards", tmp_path)
