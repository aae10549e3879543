"""What a run folder refuses to overwrite and to resume, and what it keeps until a run can begin."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from robust_submission.cli.command import parse
from robust_submission.models.trn import TRN
from robust_submission.training import run_folder
from robust_submission.training.build import build_training
from robust_submission.training.loop import run_training
from robust_submission.training.recipe import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    Recipe,
    RunRecipe,
    TRNConfig,
    TRNRecipe,
    as_plain,
)
from robust_submission.training.run_folder import MAY_CHANGE, RunFolder, changed_key


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
    for changes in ({"checkpoint": Path("none")}, {"model": ModelConfig(backbone="convnxt")}):
        with pytest.raises(ValueError, match=r"none|convnxt"):
            train(recipe_of(run, overwrite=True, **changes))
    assert contents(run) == before


def test_an_overwritten_run_leaves_nothing(run: Path):
    (run / "left").touch()
    train(recipe_of(run, overwrite=True, epochs=1))
    assert not (run / "left").exists() and (run / "state" / "epoch-0001").is_dir()


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


def other_class(run: Path) -> None:
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(data | {"class_names": {"0": "zero"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "recipe.yaml").write_text(""),
            "recipe.yaml: expected the file of a run",
        ),
        (lambda run: (run / "data.json").unlink(), "data.json: expected the file of a run"),
        (other_class, "data.json: expected class_names.0 = zero as before, found 0"),
        (cut("state/epoch-0002/model.safetensors"), "epoch-0002: expected a whole state"),
        (cut("state/epoch-0002/optimizer.bin"), "epoch-0002: expected a whole state"),
    ],
)
def test_what_cannot_be_resumed_is_named(run: Path, damage: Callable[[Path], object], message: str):
    recipe = recipe_of(run, resume=True)
    damage(run)
    with pytest.raises(ValueError, match=message) as raised:
        train(recipe)
    assert "\n" not in str(raised.value)


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
    (run / ".best-abc").mkdir()
    train(recipe_of(run, resume=True))
    assert not (run / ".best-abc").exists()
