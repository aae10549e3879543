"""The images of a run: what is refused, left out, and noticed when it has changed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image

from robust_submission.cli.command import Names
from robust_submission.data.loader import EvaluationLoader, TrainingLoader
from robust_submission.evaluation.data import open_evaluation_data
from robust_submission.models.classifier import RobustClassifier
from robust_submission.packaging.proof import proof_images
from robust_submission.settings import DataOptions
from robust_submission.training.build import build_training
from robust_submission.training.data import TrainingData, load_data
from robust_submission.training.loop import run_training, summarize
from robust_submission.training.recipe import (
    DataConfig,
    ExtraConfig,
    ModelConfig,
    Recipe,
    RunRecipe,
    as_plain,
)
from robust_submission.training.run_folder import changed_key


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes with 8 images in train/ and 2 in test/; each file of another size."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (8 + index, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def load(root: Path, **options: object) -> TrainingData:
    config = replace(DataConfig(name="folder", root=root, validation_fraction=0.25), **options)  # type: ignore[arg-type]
    return load_data(RunRecipe(batch_size=4, data=config), 8, Accelerator(cpu=True))


def test_one_class_is_refused(photos: Path) -> None:
    shutil.rmtree(photos / "train" / "dog")
    shutil.rmtree(photos / "test" / "dog")
    with pytest.raises(
        ValueError, match="data: expected images of at least two classes, found cat"
    ):
        load(photos)


def test_unreadable_images_are_found_beforehand_or_left_out(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load(photos)
    bad = [photos / "train/cat/3.png", photos / "train/dog/0.png", photos / "test/dog/1.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=f"^{bad[0]}: expected .*\n{bad[1]}.*\n{bad[2]}.*\n3 imag"):
        load(photos, check=True)
    data = load(photos, skip_bad=True, num_workers=2)
    assert [each.split(":")[1].strip() for each in caplog.messages] == [*map(str, bad)]
    for before, after in ((whole.train, data.train), (whole.validation, data.validation)):
        ids = before.dataset.source.ids
        expected = [
            i for i in before.dataset.indices if f"{photos}/train/{ids[i]}" not in [*map(str, bad)]
        ]
        assert after.dataset.indices.tolist() == expected
    assert data.test and len(data.test.dataset) == 3
    with pytest.raises(ValueError, match="data: expected a readable test image, found none of 4"):
        for path in photos.glob("test/*/*"):
            path.write_bytes(b"")
        load(photos, skip_bad=True)


def test_extra_images_are_checked_named_and_part_of_the_identity(photos: Path) -> None:
    """Their classes are in another order: Dog, cat."""
    former, root = load(photos).identity(), photos / "extra"
    shutil.copytree(photos / "train/dog", root / "Dog")
    (root / "cat").mkdir()
    shutil.copy(photos / "test/cat/0.png", root / "cat")
    extra = ExtraConfig(name="folder", root=root, fraction=0.5)
    data = load(photos, extra=extra)
    assert len(data.train.dataset) == 12 + 9
    labels = [int(data.train.dataset[place]["label"]) for place in range(12, 21)]
    assert labels == [1] * 8 + [0]
    assert RunRecipe(data=DataConfig(extra=extra)).inputs[-2:] == [root, None]
    difference = changed_key(former, data.identity(), set())
    assert difference and difference.startswith("training_images = 12 as before, found 21")
    (root / "Dog/3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Dog/3\.png: expected an image file"):
        load(photos, extra=extra, check=True)
    assert len(load(photos, extra=extra, skip_bad=True).train.dataset) == 12 + 8


def test_extra_images_of_a_table_have_columns_of_their_own(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "table"
    root.mkdir()
    image = (photos / "test/cat/0.png").read_bytes()
    columns = {"picture": [{"bytes": image, "path": None}] * 2, "kind": ["dog", "cat"]}
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "train.parquet")
    extra = ExtraConfig(name="hf", root=root, label_column="kind")
    dataset = load(photos, extra=extra).train.dataset
    assert [int(dataset[place]["label"]) for place in range(12, 14)] == [1, 0]


def test_a_teacher_labels_extra_images_that_have_no_labels(photos: Path, tmp_path: Path) -> None:
    """Its classes are in another order."""
    torch.manual_seed(0)
    teacher = RobustClassifier(class_names=["Dog", "cat"], backbone="test_convnext", image_size=32)
    teacher.save_pretrained(tmp_path / "teacher")
    images = np.random.default_rng(2).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "generated.npz", image=images)
    extra = ExtraConfig(root=tmp_path / "generated.npz", teacher=tmp_path / "teacher")
    data = load(photos, extra=extra)
    expected = teacher.eval()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).argmax(1)
    labels = [int(data.train.dataset[place]["label"]) for place in range(12, 21)]
    assert labels == (1 - expected).tolist() and {*labels} == {0, 1}
    assert RunRecipe(data=DataConfig(extra=extra)).inputs[-1] == extra.teacher
    with pytest.raises(ValueError, match=r"teacher: expected none, as .*train have labels"):
        load(photos, extra=replace(extra, name="folder", root=photos / "train"))


@pytest.mark.parametrize(
    ("name", "root", "fraction", "message"),
    [
        ("folder", "", 0.1, "data.extra.fraction: expected a share .* in a batch of 4, found 0.1"),
        ("folder", "", 0.9, "data.extra.fraction: expected a share .* in a batch of 4, found 0.9"),
        (
            "images",
            "test",
            0.5,
            "data.extra.root: expected images with labels, or data.extra.teacher .* without",
        ),
        ("folder", "other", 0.5, "expected classes of the model .* it does not know cow"),
    ],
)
def test_extra_images_that_do_not_fit_are_refused(
    photos: Path, name: str, root: str, fraction: float, message: str
) -> None:
    shutil.copytree(photos / "test/cat", photos / "other/cow")
    shutil.copytree(photos / "test/dog", photos / "other/dog")
    extra = ExtraConfig(name=name, root=photos / root, fraction=fraction)
    with pytest.raises(ValueError, match=message):
        load(photos, extra=extra)


@pytest.mark.parametrize("part", ["train", "val"])
def test_exchanged_images_change_the_identity_by_name(photos: Path, part: str) -> None:
    data, copy = load(photos), shutil.copytree(photos, photos / "copy", copy_function=shutil.copy)
    loader = data.train if part == "train" else data.validation
    first, other = (
        photos / "train" / str(loader.dataset.source.ids[i]) for i in loader.dataset.indices[:2]
    )
    former = data.identity()
    assert load(copy).identity() == former
    content = first.read_bytes()
    first.write_bytes(other.read_bytes())
    other.write_bytes(content)
    difference = changed_key(former, load(photos).identity(), set())
    assert difference and difference.startswith(f"images.{part}.cat = ")


def short_run(root: Path, output: Path) -> Recipe:
    """An epoch on a folder's images."""
    return Recipe(
        output=output,
        epochs=1,
        batch_size=4,
        trackers=Names(),
        model=ModelConfig(backbone="test_convnext"),
        data=DataConfig(name="folder", root=root),
    )


def ids_of(loader: TrainingLoader | EvaluationLoader) -> set[str]:
    dataset = loader.dataset
    return set(dataset.source.ids[dataset.indices])


def test_what_a_run_held_out_stays_so(
    photos: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """After images were removed, added or damaged, and for runs of another seed that start from it.

    Drawn anew from the images that are there now, it would be others.
    """
    shutil.rmtree(photos / "test")
    first = tmp_path_factory.mktemp("run")
    recipe = short_run(photos, first)
    recipe = replace(recipe, data=replace(recipe.data, skip_bad=True, validation_fraction=0.5))
    data = load_data(recipe, 8, Accelerator(cpu=True))
    (first / "recipe.yaml").write_text(yaml.safe_dump(as_plain(recipe)))
    (first / "data.json").write_text(json.dumps(data.identity()))
    held_out, trained = ids_of(data.validation), sorted(ids_of(data.train))
    bad = min(held_out)
    (photos / "train" / bad).write_bytes(b"")
    (photos / "train" / trained[0]).unlink()
    (photos / "train" / trained[1]).write_bytes(b"")
    for number in range(5):
        shutil.copy(photos / "train" / trained[-1], photos / f"train/cat/00{number}.png")
    evaluated = open_evaluation_data(DataOptions(), first, None, None, seed=0)
    assert set(evaluated.source.ids[evaluated.indices]) == held_out - {bad}
    assert len(proof_images(None, first, 100, 8)[0]) == 16 - 3 + 5
    for later in (
        replace(recipe, seed=1, checkpoint=first),
        replace(recipe, resume=True),
    ):
        again = load_data(later, 8, Accelerator(cpu=True))
        assert ids_of(again.validation) == held_out - {bad}
        assert not ids_of(again.train) & held_out and len(ids_of(again.train)) > len(trained) - 2
    assert any(f"{bad}: expected" in each for each in caplog.messages)
    swapped = data.identity() | {"held_out": {"cat": data.held_out["dog"]}}  # type: ignore[index]
    (first / "data.json").write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match=r"data\.json: expected dog/.*the class cat .* found dog"):
        open_evaluation_data(DataOptions(), first, None, None, seed=0)
    (first / "data.json").unlink()
    with pytest.raises(ValueError, match=r"data\.json: expected folder images .*--data\.name"):
        open_evaluation_data(DataOptions(), first, None, None, seed=0)


def test_held_out_images_are_known_elsewhere_but_not_by_places_that_have_moved(
    photos: Path, tmp_path: Path
) -> None:
    shutil.rmtree(photos / "test")
    first, copy = tmp_path / "first", tmp_path / "copy"
    shutil.copytree(photos, copy)
    images, labels = np.arange(12 * 48, dtype=np.uint8).reshape(12, 4, 4, 3), np.arange(12) // 6
    np.savez(tmp_path / "rows.npz", image=images, label=labels)
    for name, root in (("folder", photos), ("npz", tmp_path / "rows.npz")):
        recipe = short_run(root, first)
        recipe = replace(recipe, data=replace(recipe.data, name=name, validation_fraction=0.5))
        data = load_data(recipe, 8, Accelerator(cpu=True))
        first.mkdir(exist_ok=True)
        (first / "recipe.yaml").write_text(yaml.safe_dump(as_plain(recipe)))
        (first / "data.json").write_text(json.dumps(data.identity()))
        if name == "folder":
            later = replace(recipe, seed=1, checkpoint=first, data=replace(recipe.data, root=copy))
            again = load_data(later, 8, Accelerator(cpu=True))
            assert ids_of(again.validation) == ids_of(data.validation)
    np.savez(tmp_path / "rows.npz", image=images[1:], label=labels[1:])
    with pytest.raises(ValueError, match=r"of the class \d as before, found another image"):
        open_evaluation_data(DataOptions(), first, None, None, seed=0)


def test_steps_are_kept_if_a_training_image_cannot_be_read(photos: Path, tmp_path: Path) -> None:
    recipe = short_run(photos, tmp_path / "run")
    loader = load_data(recipe, 32, Accelerator(cpu=True)).train
    loader.set_epoch(0)
    *_, last = loader
    path = photos / "train" / str(loader.dataset.source.ids[int(last["indices"][0])])
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{path.name}: expected an image file, found 0 bytes"):
        run_training(recipe, build_training)
    (state,) = (tmp_path / "run/state").iterdir()
    assert state.name == "epoch-0000-step-000002"
    path.write_bytes(content)
    mended = replace(recipe, resume=True, data=replace(recipe.data, changed=True))
    run_training(mended, build_training)
    assert (tmp_path / "run/state/epoch-0001").is_dir()


def test_an_epoch_is_kept_if_a_validation_image_cannot_be_read(
    photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos / "test", photos / "val")
    content = (photos / "val/cat/0.png").read_bytes()
    (photos / "val/cat/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.png: expected an image file, found 0 bytes"):
        run_training(short_run(photos, tmp_path / "run"), build_training)
    (photos / "val/cat/0.png").write_bytes(content)
    (state,) = (tmp_path / "run/state").iterdir()
    assert state.name.startswith("epoch-0000-step-")


def test_what_was_measured_is_kept_if_a_test_image_cannot_be_read(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "test/cat/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.png: expected an image file, found 0 bytes"):
        run_training(short_run(photos, tmp_path / "run"), build_training, summarize)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["best_epoch"] == 1 and 0 <= summary["val_accuracy"] <= 1
    assert "test_accuracy" not in summary and "trained, but not tested" in caplog.messages[-1]
