from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch

from robust_submission.cli.command import parse
from robust_submission.models.checkpoint import save_trn
from robust_submission.models.trn import TRN
from robust_submission.training.build import (
    build_average,
    build_classifier,
    build_optimizer,
    build_scheduler,
)
from robust_submission.training.mixing import Mixing
from robust_submission.training.objectives import CrossEntropy, MixedCrossEntropy, build_objective
from robust_submission.training.recipe import (
    MixupConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recipe,
)
from robust_submission.training.trn_recipe import AttackConfig, RestorationConfig, TRNRecipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
SMALL = ModelConfig(backbone="test_convnext", randomize=26)
NAMES = ["a", "b", "c"]


RESTORATIONS = sorted(RECIPES.glob("*_trn.yaml"))
CLASSIFIERS = sorted(set(RECIPES.glob("*.yaml")) - set(RESTORATIONS))


@pytest.mark.parametrize("path", RESTORATIONS, ids=lambda path: path.stem)
def test_every_recipe_of_a_trn_parses(path: Path):
    recipe = parse(TRNRecipe, ["--config", str(path)], default_config=path)
    assert recipe.output == Path("runs") / path.stem
    assert recipe.checkpoint is not None
    assert recipe.checkpoint.name in {each.stem for each in CLASSIFIERS}


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_every_recipe_parses_and_builds_its_model(path: Path, monkeypatch: pytest.MonkeyPatch):
    # drawing the weights takes most of the time
    monkeypatch.setattr("timm.models.convnext.trunc_normal_", lambda *_, **__: None)
    recipe = parse(Recipe, ["--config", str(path)], default_config=path)
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


@pytest.mark.parametrize(("name", "fused"), [("adamw", True), ("sgd", True), ("lamb", None)])
def test_torch_updates_all_weights_in_one_kernel_where_it_can(name: str, fused: bool | None):
    recipe = Recipe(model=SMALL, optimizer=OptimizerConfig(name=name))
    backbone = build_classifier(recipe, NAMES).backbone
    optimizer = build_optimizer(recipe, backbone)
    assert {group.get("fused") for group in optimizer.param_groups} == {fused}
    before = [weight.detach().clone() for weight in backbone.parameters()]
    backbone(torch.rand(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert not all(map(torch.equal, before, backbone.parameters()))


def test_a_run_starts_from_another_and_behind_a_trn(tmp_path: Path):
    first = build_classifier(Recipe(seed=1, model=SMALL), NAMES)
    first.save_pretrained(tmp_path / "first")
    save_trn(TRN(width=4, depth=1), tmp_path / "trn")
    recipe = Recipe(model=SMALL, checkpoint=tmp_path / "first", trn=tmp_path / "trn")
    model = build_classifier(recipe, NAMES)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], each) for name, each in first.state_dict().items())
    assert not any(each.requires_grad for each in model.restore.parameters())
    with pytest.raises(ValueError, match=r"expected backbone\.head\.fc\.weight of shape \(2, "):
        build_classifier(recipe, NAMES[:2])


def test_layer_decay_slows_the_layers_near_the_image():
    recipe = Recipe(model=SMALL, optimizer=OptimizerConfig(layer_decay=0.5, weight_decay=0.1))
    optimizer = build_optimizer(recipe, build_classifier(recipe, NAMES).backbone)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert max(scales) == 1 and min(scales) < 0.2 and scales == sorted(scales)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    recipe = Recipe(epochs=4, model=SMALL, optimizer=OptimizerConfig(lr=1.0, warmup_epochs=1))
    optimizer = build_optimizer(recipe, build_classifier(recipe, NAMES).backbone)
    scheduler = build_scheduler(recipe, optimizer, updates_per_epoch=10)
    rates = list[float]()
    for update in range(40):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates[:10], np.arange(10) / 10)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(10, 40) / 40))
    np.testing.assert_allclose(rates[10:], cosine, atol=1e-5)


def test_the_average_forgets_the_start_of_a_short_run():
    recipe = Recipe(model=SMALL, ema_decay=0.999)
    classifier = build_classifier(recipe, NAMES)
    average = build_average(recipe, classifier)
    assert average is not None and build_average(Recipe(), classifier) is None
    start = average.module.state_dict()["backbone.head.fc.weight"].clone()
    with torch.no_grad():
        classifier.backbone.get_parameter("head.fc.weight").add_(1)
    for step in range(1, 101):
        average.update(classifier, step=step)
    moved = (average.module.state_dict()["backbone.head.fc.weight"] - start).mean()
    assert moved > 0.95  # without warm-up 1 - 0.999**100 = 0.095


@pytest.mark.parametrize("name", ["cosinus", "plateau", "none"])
def test_an_unknown_schedule_is_named(name: str):
    recipe = Recipe(model=SMALL, optimizer=OptimizerConfig(schedule=name))
    optimizer = build_optimizer(recipe, build_classifier(recipe, NAMES).backbone)
    with pytest.raises(ValueError, match=name):
        build_scheduler(recipe, optimizer, updates_per_epoch=10)


def test_an_optimiser_of_second_order_is_named():
    recipe = Recipe(model=SMALL, optimizer=OptimizerConfig(name="adahessian"))
    with pytest.raises(ValueError, match=r"optimizer\.name: expected .* received adahessian"):
        build_optimizer(recipe, build_classifier(recipe, NAMES).backbone)


@pytest.mark.parametrize(("backbone", "size"), [("test_convnext", 3), ("vit_tiny_patch16_224", 32)])
def test_a_size_that_the_backbone_does_not_take_is_named(backbone: str, size: int):
    recipe = Recipe(model=ModelConfig(backbone=backbone, image_size=size))
    with pytest.raises(ValueError, match=f"expected one that {backbone} takes, received {size}: "):
        build_classifier(recipe, NAMES)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (OptimizerConfig, "clip_grad", -1.0),
        (OptimizerConfig, "layer_decay", 1.5),
        (OptimizerConfig, "lr", nan),
        (ObjectiveConfig, "label_smoothing", 1.0),
        (ObjectiveConfig, "epsilon", nan),
        (ObjectiveConfig, "beta", nan),
        (MixupConfig, "mixup_alpha", nan),
        (MixupConfig, "cutmix_alpha", nan),
        (ModelConfig, "image_size", 0),
        (Recipe, "seed", -1),
        (Recipe, "seed", 2**32),
        (AttackConfig, "weight", nan),
        (RestorationConfig, "feature", nan),
    ],
)
def test_what_makes_no_sense_is_refused(config: type, key: str, value: float):
    with pytest.raises(ValueError, match=rf"expected .* received .*{value}"):
        config(**{key: value})


def test_mixing_is_off_unless_asked_for():
    assert isinstance(build_objective(ObjectiveConfig(), MixupConfig()), CrossEntropy)
    cutmix = MixupConfig(cutmix_alpha=0.8, prob=0.5)
    objective = build_objective(ObjectiveConfig(label_smoothing=0.1), cutmix)
    mixing = Mixing(mixup_alpha=0, cutmix_alpha=0.8)
    assert objective == MixedCrossEntropy(mixing=mixing, probability=0.5, label_smoothing=0.1)
    with pytest.raises(ValueError, match="expected both alphas 0"):
        Recipe(mixup=cutmix, objective=ObjectiveConfig(name="adversarial"))
    with pytest.raises(ValueError, match="prob from 0 to 1"):
        MixupConfig(prob=1.5)
