"""What a run folder refuses to overwrite and to resume, and what it keeps until a run can begin."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file

from robust_submission.cli.command import parse
from robust_submission.cli.errors import log
from robust_submission.models.trn import TRN
from robust_submission.training import run_folder
from robust_submission.training.build import build_training
from robust_submission.training.loop import run_training
from robust_submission.training.recipe import (
    DataConfig,
    MixupConfig,
    ModelConfig,
    ObjectiveConfig,
    Recipe,
    RunRecipe,
    TRNConfig,
    TRNRecipe,
    as_plain,
)
from robust_submission.training.run_folder import MAY_CHANGE, RunFolder, best_epoch, changed_key
from robust_submission.training.saved_state import complete_state
from robust_submission.training.state import Training


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(small_run, tmp_path / "run")


def recipe_of(run: Path, **changes: Any) -> Recipe:
    recipe = parse(Recipe, [], default_config=run / "recipe.yaml")
    return replace(recipe, output=run, **changes)


def train(recipe: Recipe) -> None:
    run_training(recipe, build_training)


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_that_cannot_begin_overwrites_nothing(run: Path):
    before = contents(run)
    odd = {"batch_size": 15, "mixup": MixupConfig(mixup_alpha=1)}
    missing = {"checkpoint": Path("none")}
    for changes in (missing, {"model": ModelConfig(backbone="convnxt")}, odd):
        with pytest.raises(ValueError, match=r"none|convnxt|even number"):
            train(recipe_of(run, overwrite=True, **changes))
    assert contents(run) == before


def test_an_overwritten_run_leaves_what_is_the_users(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(log, "propagate", True)
    (run / "notes.txt").write_text("mine")
    (run / "state" / "epoch-0001-mine").mkdir()
    (run / "state" / "epoch-0001.tar").write_text("mine")
    with caplog.at_level("INFO"):
        train(recipe_of(run, overwrite=True, epochs=1))
    assert f"{run}: not the former run's, and left there: notes.txt, state" in caplog.text
    assert (run / "notes.txt").read_text() == "mine" and not (run / "summary.json").exists()
    kept = {"epoch-0001", "epoch-0001-mine", "epoch-0001.tar"}
    assert {path.name for path in (run / "state").iterdir()} == kept


def test_a_run_whose_folder_is_deleted_is_no_success(run: Path, monkeypatch: pytest.MonkeyPatch):
    validate = Training.validate

    def deleting(*arguments: Any) -> dict[str, float]:
        shutil.rmtree(run)
        return validate(*arguments)

    monkeypatch.setattr(Training, "validate", deleting)
    with pytest.raises(ValueError, match=f"^{run}: expected the folder of this run, found it del"):
        train(recipe_of(run, overwrite=True, epochs=1))


def test_a_link_in_place_of_unfinished_states_is_not_followed(run: Path, tmp_path: Path):
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "file").write_text("mine")
    (run / "state" / "partial").symlink_to(tmp_path / "users")
    folder = RunFolder(recipe_of(run, resume=True), is_main=True)
    with pytest.raises(ValueError, match=r"partial: expected .* own, found a symbolic link"):
        folder.save_state(Accelerator(cpu=True), None)
    assert contents(tmp_path / "users") == {tmp_path / "users" / "file": b"mine"}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(checkpoint=Path("runs/a")),
        Recipe(trn=Path("runs/../runs/a/b")),
        Recipe(data=DataConfig(root=Path("runs/a/images"))),
        TRNRecipe(checkpoint=Path("runs/a/b")),
        TRNRecipe(model="a:b", trn=TRNConfig(start=Path("runs/a"))),
    ],
)
def test_what_a_run_reads_is_not_overwritten(recipe: RunRecipe):
    with pytest.raises(ValueError, match=r"^runs/a: expected nothing that the run reads, found"):
        RunFolder(replace(recipe, output=Path("runs/a"), overwrite=True), is_main=True)


@pytest.mark.parametrize(
    ("robust", "restored", "epoch"),
    [([0, 0.2, 0.1], [0.5, 0.3, 0.9], 2), ([0, 0, 0], [0.2, 0.6, 0.4], 2), ([0, 0], [1, 1], 1)],
)
def test_equal_epochs_are_told_apart_by_the_next_metric(
    robust: list[float], restored: list[float], epoch: int
):
    names = ("val_robust_accuracy", "val_restored_accuracy")
    rows = [dict(zip(names, row, strict=True)) for row in zip(robust, restored, strict=True)]
    assert best_epoch(rows) == epoch


def test_a_key_that_is_gone_is_a_change():
    former = as_plain(Recipe(model=ModelConfig(backbone_args={"patch_size": 2})))
    change = changed_key(former, as_plain(Recipe()), MAY_CHANGE)
    assert change == "model.backbone_args.patch_size = 2 as before, found None"


@pytest.mark.parametrize(("gamma", "may_change"), [(0.0, True), (0.01, False)])
def test_parts_of_a_step_may_change_unless_each_perturbs(
    tmp_path: Path, gamma: float, may_change: bool
):
    objective = ObjectiveConfig(name="adversarial", awp_gamma=gamma)
    recipe = Recipe(output=tmp_path, objective=objective)
    RunFolder(recipe, is_main=True).write_yaml("recipe.yaml", as_plain(recipe))
    (tmp_path / "state" / "epoch-0001").mkdir(parents=True)
    parts = replace(recipe, resume=True, gradient_accumulation=2)
    if may_change:
        RunFolder(parts, is_main=True)
        return
    with pytest.raises(ValueError, match="expected gradient_accumulation = 1 as before, found 2"):
        RunFolder(parts, is_main=True)


def cut(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        path = run / name
        path.write_bytes(path.read_bytes()[:1000])

    return damage


def drop(name: str) -> Callable[[Path], None]:
    """Delete a file of the last state, as saved within an epoch, with losses."""

    def damage(run: Path) -> None:
        state = run / "state" / "epoch-0002"
        save_file({"losses": torch.zeros(1, 9)}, state / "losses.safetensors")
        complete_state(state, state.name)
        (state / name).unlink()

    return damage


def add_file(run: Path) -> None:
    (run / "state/epoch-0002/more").touch()


def remove_former(run: Path) -> None:
    shutil.rmtree(run / "state/epoch-0001")
    (run / "state/epoch-0002/optimizer.bin").unlink()


def other_class(run: Path) -> None:
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(data | {"class_names": {"0": "zero"}}))


def other_image(run: Path) -> None:
    data = json.loads((run / "data.json").read_text())
    data["images"]["train"]["3"] = "0"
    (run / "data.json").write_text(json.dumps(data | {"training_images": 1}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "recipe.yaml").write_text(""), "recipe.yaml: expected a valid dict"),
        (lambda run: (run / "data.json").unlink(), "data.json: expected the file of a run"),
        (other_class, "data.json: expected class_names.0 = zero as before, found 0"),
        (other_image, "training_images = 1 as before, .* \\(data.changed allows it\\); a resumed"),
        (cut("state/epoch-0002/model.safetensors"), "model.safetensors: .*found other bytes.\nDel"),
        (cut("state/epoch-0002/optimizer.bin"), "0002/optimizer.bin: expected the file that was"),
        (drop("losses.safetensors"), "losses.safetensors: .*nothing there.\n.* from epoch-0001.$"),
        (
            drop("manifest.json"),
            "manifest.json: expected the digests .*, found nothing there.\nDel",
        ),
        (add_file, "epoch-0002/more: expected nothing there, found a file that was not saved"),
        (remove_former, "epoch-0002/optimizer.bin: .*, found nothing there.$"),
    ],
)
def test_what_cannot_be_resumed_is_named(run: Path, damage: Callable[[Path], object], message: str):
    recipe = recipe_of(run, resume=True)
    damage(run)
    with pytest.raises(ValueError, match=message) as raised:
        train(recipe)
    assert len(str(raised.value).splitlines()) <= 2


def test_a_run_resumes_on_changed_images_where_that_is_meant(run: Path):
    recipe = recipe_of(run, resume=True)
    other_image(run)
    train(replace(recipe, data=replace(recipe.data, changed=True)))
    assert json.loads((run / "data.json").read_text())["training_images"] > 1


def test_the_last_state_is_of_the_latest_step(tmp_path: Path):
    folder = RunFolder(RunRecipe(output=tmp_path), is_main=True)
    assert folder.last_state() is None
    for name in ("epoch-9999", "epoch-9999-step-000120", "epoch-9999-step-1000000", "epoch-10000"):
        (tmp_path / "state" / name).mkdir(parents=True)
        assert folder.last_state() == tmp_path / "state" / name


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(run_folder, "save_trn", full)
    folder = RunFolder(RunRecipe(output=tmp_path), is_main=True)
    with pytest.raises(ValueError, match=f"^{tmp_path}: not written: No space left on device$"):
        folder.write_best(TRN(width=4, depth=1))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_kill_left_of_a_best_checkpoint_is_cleared(run: Path):
    left = run / ".best.0123456789abcdef.tmp"
    left.mkdir()
    train(recipe_of(run, resume=True))
    assert not left.exists()
