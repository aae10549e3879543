"""What a recipe is built into: model, optimiser, schedule, average, an arranged backbone."""

import copy
from dataclasses import replace
from functools import partialmethod
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks import PGD
from robust_submission.cli.command import Ratio, parse
from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint, save_trn
from robust_submission.models.trn import TRN
from robust_submission.training.build import arrange_backbone, training_mode
from robust_submission.training.objectives import CrossEntropy, Trades
from robust_submission.training.recipe import (
    AttackConfig,
    MixupConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recipe,
    RestorationConfig,
    TRNRecipe,
)
from robust_submission.training.start import build_classifier
from robust_submission.training.state import Training

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
RESTORATIONS = sorted(RECIPES.glob("*_trn*.yaml"))
CLASSIFIERS = sorted(set(RECIPES.glob("*.yaml")) - set(RESTORATIONS))
SMALL = ModelConfig(backbone="test_convnext", randomize=26)
NAMES = ["a", "b", "c"]


@pytest.mark.parametrize("path", RESTORATIONS, ids=lambda path: path.stem)
def test_every_recipe_of_a_trn_parses(path: Path):
    recipe = parse(TRNRecipe, [], default_config=path)
    assert recipe.output == Path("runs") / path.stem
    assert recipe.checkpoint is not None
    assert recipe.checkpoint.name in {each.stem for each in CLASSIFIERS}


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_every_recipe_parses_and_builds_its_model(path: Path, monkeypatch: pytest.MonkeyPatch):
    # drawing the weights takes most of the time
    monkeypatch.setattr("timm.models.convnext.trunc_normal_", lambda *_, **__: None)
    recipe = parse(Recipe, [], default_config=path)
    assert recipe.output == Path("runs") / path.stem
    if recipe.checkpoint is not None:  # the second stage of another recipe
        assert recipe.checkpoint.name in {each.stem for each in CLASSIFIERS}
        recipe = replace(recipe, checkpoint=None)
    model = build_classifier(recipe, NAMES)
    assert model.image_size == recipe.model.image_size


def test_one_seed_gives_one_start():
    first, again, other = (
        build_classifier(Recipe(seed=seed, model=SMALL), NAMES).state_dict() for seed in (0, 0, 1)
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["backbone.stem.0.weight"], other["backbone.stem.0.weight"])


def test_a_run_starts_from_another_and_behind_a_trn(tmp_path: Path):
    first = build_classifier(Recipe(seed=1, model=SMALL), NAMES)
    first.save_pretrained(tmp_path / "first")
    save_trn(TRN(width=4, depth=1), tmp_path / "trn")
    recipe = Recipe(model=SMALL, checkpoint=tmp_path / "first", trn=tmp_path / "trn")
    model = build_classifier(recipe, NAMES)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], each) for name, each in first.state_dict().items())
    assert not any(each.requires_grad for each in model.restore.parameters())
    model.save_pretrained(tmp_path / "second")
    third = build_classifier(replace(recipe, checkpoint=tmp_path / "second", trn=None), NAMES)
    assert isinstance(third.restore, nn.Identity)
    assert all(torch.equal(weights[name], each) for name, each in third.state_dict().items())
    with pytest.raises(UserError, match=r"expected backbone\.head\.fc\.weight of shape \(2, "):
        build_classifier(recipe, NAMES[:2])


def test_the_average_forgets_the_start_of_a_short_run():
    recipe = Recipe(model=SMALL, ema_decay=0.999)
    classifier = build_classifier(recipe, NAMES)
    unused: Any = None
    average = Training(
        recipe=recipe,
        accelerator=Accelerator(cpu=True),
        classifier=classifier,
        model=classifier,
        optimizer=torch.optim.SGD(classifier.parameters()),
        scheduler=unused,
        objective=CrossEntropy(),
        validation_attacks={},
        train_loader=unused,
    ).ema
    assert average is not None
    start = average.module.state_dict()["backbone.head.fc.weight"].clone()
    with torch.no_grad():
        classifier.backbone.get_parameter("head.fc.weight").add_(1)
    for step in range(1, 101):
        average.update(classifier, step=step)
    moved = (average.module.state_dict()["backbone.head.fc.weight"] - start).mean()
    assert moved > 0.95  # without warm-up 1 - 0.999**100 = 0.095


@pytest.mark.parametrize(("backbone", "size"), [("test_convnext", 3), ("vit_tiny_patch16_224", 32)])
def test_a_size_that_the_backbone_does_not_take_is_named(backbone: str, size: int):
    recipe = Recipe(model=ModelConfig(backbone=backbone, image_size=size))
    with pytest.raises(UserError, match=f"expected one that {backbone} takes, found {size}: "):
        build_classifier(recipe, NAMES)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (OptimizerConfig, {"clip_grad": -1.0}, "clip_grad: expected above 0, or null, found -1.0"),
        (OptimizerConfig, {"layer_decay": 1.5}, "found 1.5"),
        (OptimizerConfig, {"lr": nan}, "lr: expected a number from 0 on, found nan"),
        (ObjectiveConfig, {"label_smoothing": 1.0}, "from 0 to below 1, found 1.0"),
        (ObjectiveConfig, {"epsilon": nan}, "epsilon >= 0"),
        (ObjectiveConfig, {"steps": 0}, "steps >= 1"),
        (ObjectiveConfig, {"name": "trades", "beta": -1.0}, "beta, awp_gamma, awp_warmup >= 0"),
        (
            ObjectiveConfig,
            {"name": "challenge", "awp_gamma": 0.01},
            "expected adversarial, trades",
        ),
        (
            ObjectiveConfig,
            {"name": "challenge", "norm": "l2"},
            "norm: expected linf, as the",
        ),
        (ObjectiveConfig, {"steps": 7}, "steps: expected 10, as the objective standard does not"),
        (ObjectiveConfig, {"name": "adversarial", "beta": 6.0}, "beta: expected None, as the"),
        (ObjectiveConfig, {"name": "trades", "noise": -1.0}, "noise: expected a number from 0"),
        (MixupConfig, {"mixup_alpha": nan}, "expected alphas >= 0"),
        (MixupConfig, {"prob": 1.5}, "prob from 0 to 1"),
        (ModelConfig, {"freeze_epochs": -1}, "freeze_epochs: expected at least 0, found -1"),
        (Recipe, {"model": ModelConfig(freeze_epochs=1)}, "expected 0 without model.pretrained"),
        (
            Recipe,
            {"model": ModelConfig(pretrained=True), "checkpoint": Path("runs/a")},
            "pretrained: expected false with a checkpoint",
        ),
        (ModelConfig, {"image_size": 0}, "image_size: expected from 1 to 8192, found 0"),
        (Recipe, {"seed": 2**32}, "from 0 to"),
        (
            Recipe,
            {"mixup": MixupConfig(mixup_alpha=1), "objective": ObjectiveConfig(name="trades")},
            "expected both alphas 0 with the objective trades",
        ),
        (
            Recipe,
            {"model": ModelConfig(compile=True), "trn": Path("runs/trn")},
            "model.compile: expected false with a trn",
        ),
        (AttackConfig, {"weight": nan}, "expected weight > 0"),
        (AttackConfig, {"epsilon": Ratio(-1)}, "expected epsilon >= 0"),
        (AttackConfig, {"steps": 0}, "expected steps >= 1"),
        (RestorationConfig, {"feature": nan}, "weights of at least 0"),
        (RestorationConfig, {"reconstruction": -1.0}, "weights of at least 0"),
        (RestorationConfig, {"attacks": []}, "expected attacks"),
        (RestorationConfig, {"clean": 1.5}, "clean from 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(config: type, arguments: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        config(**arguments)


IMAGES = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3


@pytest.fixture
def classifier() -> RobustClassifier:
    torch.manual_seed(0)
    return RobustClassifier(
        class_names=NAMES,
        backbone="test_convnext",
        backbone_args={"depths": [1, 1, 1, 1]},
        image_size=32,
    )


def trained(classifier: RobustClassifier) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and weights of three steps with adversarial examples, and of an average."""
    objective = Trades(attack=PGD(epsilon=2 / 255, steps=1))
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    average = ModelEmaV3(classifier, decay=0.5)
    losses = list[float]()
    for _ in range(3):
        examples = objective.examples(classifier.train(), IMAGES, LABELS, torch.arange(8))
        loss = objective.loss(classifier, examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(classifier)
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(F.cross_entropy(average.module.eval()(IMAGES), LABELS).item())
    return losses, classifier.state_dict()


@pytest.mark.parametrize("option", ["channels_last", "gradient_checkpointing", "compile"])
def test_the_arranged_backbone_trains_the_same(
    classifier: RobustClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
):
    # torch's own compiler of C++ takes more than a minute, and is not what is tested
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    other = copy.deepcopy(classifier)
    config = ModelConfig(
        compile=option == "compile",
        gradient_checkpointing=option == "gradient_checkpointing",
    )
    arrange_backbone(config, other.backbone, channels_last=option == "channels_last")
    stem = other.backbone.get_parameter("stem.0.weight")
    assert stem.is_contiguous(memory_format=torch.channels_last) == (option == "channels_last")
    stages = other.backbone.get_submodule("stages").children()
    assert {each.grad_checkpointing for each in stages} == {option == "gradient_checkpointing"}
    (losses, weights), (other_losses, other_weights) = trained(classifier), trained(other)
    assert losses[0] > losses[2]
    torch.testing.assert_close(other_losses, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(other_weights), dict(weights), rtol=1e-3, atol=1e-4)
    other.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
    with torch.no_grad():
        loaded, own = load_checkpoint(tmp_path)(IMAGES), other.eval()(IMAGES)
    torch.testing.assert_close(loaded, own, rtol=1e-4, atol=1e-5)


def test_a_backbone_without_checkpointing_is_named():
    without = timm.create_model("inception_v3", num_classes=2)
    config = ModelConfig(backbone="inception_v3", gradient_checkpointing=True)
    with pytest.raises(UserError, match="that supports it, found inception_v3"):
        arrange_backbone(config, without, channels_last=False)


@pytest.mark.parametrize(
    ("device", "processes", "settings", "graphs"),
    [
        ("cuda", 1, {}, True),
        ("cuda", 2, {}, False),
        ("cuda", 1, {"gradient_accumulation": 2}, False),
        ("cuda", 1, {"auto_batch_size": True}, False),
        ("cpu", 1, {}, False),
    ],
)
def test_cuda_graphs_need_one_gpu_without_accumulation(
    classifier: RobustClassifier,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    processes: int,
    settings: dict[str, Any],
    graphs: bool,
):
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    mode = training_mode(Recipe(**settings), cast(Accelerator, accelerator))
    modes = list[str | None]()
    monkeypatch.setattr(nn.Module, "compile", lambda _, mode: modes.append(mode))
    arrange_backbone(ModelConfig(compile=True), classifier.backbone, channels_last=False, mode=mode)
    assert modes == ["reduce-overhead" if graphs else None]
