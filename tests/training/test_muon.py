"""The precision of Muon's steps."""

import pytest
import torch
from torch import Tensor, nn

from robust_submission.training import muon
from robust_submission.training.build import build_optimizer
from robust_submission.training.recipe import OptimizerConfig, Recipe

QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
"""https://leloykun.github.io/ponder/muon-opt-coeffs, timm's default."""
GRADIENT = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))


def step_of_muon() -> Tensor:
    """The change of a weight (16, 40) from zeros, in one step with this gradient."""
    layer = nn.Linear(40, 16, bias=False)
    nn.init.zeros_(layer.weight)
    recipe = Recipe(optimizer=OptimizerConfig(name="muon", lr=1.0, weight_decay=0))
    optimizer = build_optimizer(recipe, layer)
    layer.weight.grad = GRADIENT.clone()
    optimizer.step()
    return layer.weight.detach()


def orthogonalized(gradient: Tensor) -> Tensor:
    """What the iteration does to the singular values, in float64."""
    left, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for first, third, fifth in QUINTIC:
        values = first * values + third * values**3 + fifth * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize(("emulates", "error"), [(True, (0, 1e-4)), (False, (1e-3, 0.1))])
def test_bfloat16_is_only_used_where_it_is_not_emulated(
    monkeypatch: pytest.MonkeyPatch, emulates: bool, error: tuple[float, float]
):
    monkeypatch.setattr(muon, "EMULATES_BFLOAT16", emulates)
    step = step_of_muon().double()
    expected = orthogonalized(GRADIENT)
    expected *= -step.norm() / expected.norm()
    least, most = error
    assert least < (step - expected).norm() / expected.norm() < most
