"""torchvision's readers on small files in their true formats; no network."""

import gzip
import hashlib
import json
import pickle
import shutil
import socket
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torchvision.datasets import CIFAR10, SVHN, FashionMNIST

from robust_submission.cli.command import parse
from robust_submission.data.sources import available_splits, open_source
from robust_submission.models.load import load_checkpoint, load_trn
from robust_submission.training.build import build_training, build_trn_training
from robust_submission.training.loop import run_training, summarize
from robust_submission.training.recipe import Recipe, TRNRecipe
from tests.conftest import ROOT

RECIPES = ROOT / "training" / "recipes"
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (10, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 0])


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five training batches of two images and a test batch of three, with their own md5."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, part: slice) -> list[str]:
        pixels = COLOUR[part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        batch = {"data": pixels, "labels": LABELS[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
        return [name, md5(folder / name)]

    batches = [write(f"data_batch_{n + 1}", slice(2 * n, 2 * n + 2)) for n in range(5)]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", slice(3))])
    meta = folder / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(meta)})
    return tmp_path


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MATLAB files, images last, where 10 stands for the digit 0."""
    written = {}
    for split, count in (("train", 10), ("test", 3)):
        path = tmp_path / f"{split}_32x32.mat"
        labels = np.where(LABELS[:count] == 0, 10, LABELS[:count])[:, None]
        scipy.io.savemat(path, {"X": COLOUR[:count].transpose(1, 2, 3, 0), "y": labels})
        written[split] = [f"http://nowhere/{path.name}", path.name, md5(path)]
    monkeypatch.setattr(SVHN, "split_list", written)
    return tmp_path


def idx(values: np.ndarray) -> bytes:
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes())


@pytest.fixture
def fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four gzipped IDX files, as the download leaves them before it unpacks them."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    resources = []
    for prefix, count in (("train", 10), ("t10k", 3)):
        for kind, values in (("images-idx3", GREY[:count]), ("labels-idx1", LABELS[:count])):
            path = folder / f"{prefix}-{kind}-ubyte.gz"
            path.write_bytes(idx(values))
            resources.append((path.name, md5(path)))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    return tmp_path


def check(name: str, root: Path, split: str, download: bool = False) -> None:
    """The source has the images and labels that were written."""
    source = open_source(name, root, split, download=download)
    count = 10 if split == "train" else 3
    grey = np.repeat(GREY[..., None], 3, axis=3)
    expected = grey if name == "fashion_mnist" else COLOUR
    assert len(source) == count
    images = np.stack([source.image(index) for index in range(count)])
    assert images.dtype == np.uint8
    assert np.array_equal(images, expected[:count])
    assert source.labels is not None
    assert source.class_names is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == LABELS[:count].tolist()
    assert len(source.class_names) == 10
    assert source.ids.tolist() == [f"{index:05d}.png" for index in range(count)]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["cifar10", "svhn", "fashion_mnist"])
def test_images_labels_and_names(request: pytest.FixtureRequest, name: str, split: str) -> None:
    root = request.getfixturevalue(name.replace("cifar10", "cifar"))
    check(name, root, split, download=name == "fashion_mnist")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *(("cifar10", ""), ("svhn", "SVHN")),
        *(("fashion_mnist", folder) for folder in ("", "raw", "data/fashion", "FashionMNIST/raw")),
    ],
)
def test_files_are_read_where_they_lie(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, folder: str
) -> None:
    original = request.getfixturevalue(name.replace("cifar10", "cifar"))
    files = [path for path in original.rglob("*") if path.is_file()]
    (tmp_path / "other" / folder).mkdir(parents=True)
    for path in files:
        path.rename(tmp_path / "other" / folder / path.name)
    before = sorted((tmp_path / "other").rglob("*"))
    for split in ("train", "test"):
        check(name, tmp_path / "other", split)
    assert sorted((tmp_path / "other").rglob("*")) == before


def test_an_archive_of_cifar10_is_read_as_it_is(cifar: Path) -> None:
    folder = cifar / "cifar-10-batches-py"
    with tarfile.open(cifar / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    check("cifar10", cifar, "test")
    archive = cifar / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected cifar10 as .* missing or damaged"):
        open_source("cifar10", cifar)


@pytest.mark.parametrize("name", ["cifar10", "svhn", "fashion_mnist"])
def test_missing_files_are_named_with_the_way_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected {name} as .* found them missing"):
        open_source(name, tmp_path)
    with pytest.raises(ValueError, match=r"--data\.download") as caught:
        open_source(name, tmp_path)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_damaged_file_is_noticed(cifar: Path) -> None:
    path = cifar / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"expected cifar10 as .* missing or damaged"):
        open_source("cifar10", cifar)


@pytest.mark.parametrize("name", ["cifar10", "svhn", "fashion_mnist"])
def test_a_failed_download_is_one_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected {name}") as caught:
        open_source(name, tmp_path, download=True)
    assert len(str(caught.value).splitlines()) <= 3


def test_the_recipes_of_svhn_run_from_end_to_end(svhn: Path, tmp_path: Path) -> None:
    classifier, restorer = tmp_path / "classifier", tmp_path / "trn"
    small = ("--data.root", svhn, "--data.num_workers", 0, "--epochs", 1, "--batch_size", 4)
    small = (*small, "--optimizer.warmup_epochs", 0, "--data.validation_fraction", 0.2)

    def options(*more: object) -> list[str]:
        return [str(each) for each in (*small, *more)]

    backbone = ("--model.backbone", "test_convnext", "--model.backbone_args", "{}")
    arguments = options("--output", classifier, *backbone)
    recipe = parse(Recipe, arguments, default_config=RECIPES / "svhn.yaml")
    run_training(recipe, build_training, summarize)
    tested = torch.from_numpy(COLOUR[:3]).permute(0, 3, 1, 2) / 255
    model, labels = load_checkpoint(classifier), torch.from_numpy(LABELS[:3])
    accuracy = (model(tested).argmax(1) == labels).double().mean().item()
    assert json.loads((classifier / "summary.json").read_text())["test_accuracy"] == accuracy
    arguments = options("--output", restorer, "--checkpoint", classifier)
    recipe = parse(TRNRecipe, arguments, default_config=RECIPES / "svhn_trn.yaml")
    run_training(recipe, build_trn_training)
    assert load_trn(restorer)(tested, model.classify).shape == tested.shape


def test_there_is_no_validation_split() -> None:
    assert available_splits("svhn") == ("train", "test")
    with pytest.raises(ValueError, match="svhn: expected the split train or test, found 'val'"):
        open_source("svhn", split="val")
