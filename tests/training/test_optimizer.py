"""The optimiser against timm's and closed forms, and the schedule against its formula."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.optim.muon import Muon
from torch import nn

from robust_submission.cli.errors import UserError, log
from robust_submission.training.optimizer import Float32Muon, build_optimizer, build_scheduler
from robust_submission.training.recipe import ModelConfig, OptimizerConfig, Recipe
from robust_submission.training.start import build_classifier

SMALL = ModelConfig(backbone="test_convnext")
NAMES = ["a", "b", "c"]


@pytest.mark.parametrize("name", ["muon", "nmuon"])
def test_muon_in_float32_follows_timms_within_bfloat16(name: str):
    network, updated = build_classifier(Recipe(model=SMALL), NAMES).backbone, []
    start = {key: each.clone() for key, each in network.state_dict().items()}
    for kind in (Muon, Float32Muon):
        network.load_state_dict(start)
        groups = create_optimizer_v2(network, opt=name, lr=1e-2, weight_decay=0.1)
        optimizer = kind(groups.param_groups, **groups.defaults)
        torch.manual_seed(0)
        for _ in range(3):
            for weight in network.parameters():
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        updated.append([each.detach().clone() for each in network.parameters()])
        assert all(each.grad is not None for each in network.parameters())
    for former, theirs, ours in zip(start.values(), *updated, strict=True):
        moved = (theirs - former).norm()
        assert moved > 0
        assert (ours - theirs).norm() < 0.03 * moved


def test_muon_in_float32_makes_updates_orthogonal():
    layer = nn.Linear(8, 8, bias=False)
    start = layer.weight.detach().clone()
    optimizer = Float32Muon(layer.parameters(), lr=1.0, adjust_lr_fn="rms_to_rms")
    layer.weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals((layer.weight - start).detach())
    assert values.min() > 0.7 and values.max() < 1.3


@pytest.mark.parametrize(("name", "fused"), [("adamw", True), ("sgd", True), ("lamb", None)])
def test_torch_updates_all_weights_in_one_kernel_where_it_can(name: str, fused: bool | None):
    backbone = build_classifier(Recipe(model=SMALL), NAMES).backbone
    optimizer = build_optimizer(OptimizerConfig(name=name), backbone)
    assert {group.get("fused") for group in optimizer.param_groups} == {fused}
    before = [weight.detach().clone() for weight in backbone.parameters()]
    backbone(torch.rand(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert not all(map(torch.equal, before, backbone.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_layer_decay_slows_the_layers_near_the_image(name: str, stem: Literal["patch", "conv"]):
    config = OptimizerConfig(name=name, layer_decay=0.5, weight_decay=0.1)
    model = ModelConfig(backbone="test_convnext", stem=stem)
    backbone = build_classifier(Recipe(model=model), NAMES).backbone
    optimizer = build_optimizer(config, backbone)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert max(scales) == 1 and min(scales) < 0.2 and scales == sorted(scales)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    slowest = [group for group in optimizer.param_groups if group["lr_scale"] == scales[0]]
    weights = {id(weight) for group in slowest for weight in group["params"]}
    assert weights == {id(weight) for weight in backbone.get_submodule("stem").parameters()}
    backbone(torch.rand(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()


def rates_of(epochs: int, **options: Any) -> list[float]:
    """The learning rate in each of ten updates an epoch, at most 1."""
    recipe = Recipe(epochs=epochs, optimizer=OptimizerConfig(lr=1.0, **options))
    optimizer = build_optimizer(recipe.optimizer, nn.Linear(2, 2))
    scheduler = build_scheduler(recipe, optimizer, updates_per_epoch=10)
    rates = list[float]()
    for update in range(10 * epochs):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = rates_of(4, warmup_epochs=1)
    np.testing.assert_allclose(rates[:10], np.arange(10) / 10)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(10, 40) / 40))
    np.testing.assert_allclose(rates[10:], cosine, atol=1e-5)


def test_a_warm_up_that_outlasts_the_run_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(log, "propagate", True)
    assert max(rates_of(2, warmup_epochs=3)) < 0.7
    assert caplog.messages == [
        "optimizer.warmup_epochs: the learning rate rises for 3 epochs, and the run has 2."
    ]
    rates_of(3, warmup_epochs=2)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step", [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001]),
        ("multistep", [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001]),
        ("poly", np.arange(10, 0, -1) / 10),
    ],
)
def test_other_schedules_fall_within_the_run(name: str, expected: Sequence[float]):
    rates = rates_of(10, warmup_epochs=0, schedule=name)
    np.testing.assert_allclose(rates[::10], expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["cosinus", "plateau", "none"])
def test_an_unknown_schedule_is_named(name: str):
    recipe = Recipe(optimizer=OptimizerConfig(schedule=name))
    optimizer = build_optimizer(recipe.optimizer, nn.Linear(2, 2))
    with pytest.raises(UserError, match=f"other than plateau, found {name}"):
        build_scheduler(recipe, optimizer, updates_per_epoch=10)


@pytest.mark.parametrize("name", ["adamww", "adahessian", "fusedadam"])
def test_an_optimiser_that_cannot_be_used_is_named(name: str):
    with pytest.raises(UserError, match=rf"^optimizer.*: expected .* found {name}"):
        build_optimizer(OptimizerConfig(name=name), nn.Linear(2, 2))
