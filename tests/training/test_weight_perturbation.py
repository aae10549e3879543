import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.training.loop import perturbation
from robust_submission.training.weight_perturbation import WeightPerturbation

IMAGES = torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 4))


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IMAGES), LABELS)


def gradient(weight: Tensor, bias: Tensor) -> Tensor:
    """Of the mean cross-entropy with respect to the weight, in closed form."""
    surplus = (IMAGES.flatten(1) @ weight.T + bias).softmax(1) - F.one_hot(LABELS, 4)
    return surplus.T @ IMAGES.flatten(1) / 8


def test_the_weight_moves_along_its_gradient_and_comes_back(model: nn.Module):
    linear, before = model[2], copy.deepcopy(model.state_dict())  # pyright: ignore[reportIndexIssue]
    weight, bias = before["2.weight"], before["2.bias"]
    direction = gradient(weight, bias)
    expected = weight + 0.1 * weight.norm() * direction / direction.norm()
    with WeightPerturbation(gamma=0.1)(model.train(), loss, lambda gradients: gradients):
        torch.testing.assert_close(linear.weight.detach(), expected)
        assert torch.equal(linear.bias, bias)
        assert all(module.training for module in model.modules())
        assert linear.weight.grad is None
        loss(model.eval()).backward()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    torch.testing.assert_close(linear.weight.grad, gradient(expected, bias))


def test_an_error_brings_the_weights_back(model: nn.Module):
    before = copy.deepcopy(model.state_dict())
    perturbed = WeightPerturbation(gamma=0.1)(model, loss, lambda gradients: gradients)
    with pytest.raises(KeyError), perturbed:
        raise KeyError
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_all_processes_take_the_mean_of_their_gradients(model: nn.Module):
    other = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    linear = model[2]  # pyright: ignore[reportIndexIssue]
    weight = linear.weight.detach().clone()
    direction = (gradient(weight, linear.bias.detach()) + other) / 2

    def mean(gradients: list[Tensor]) -> list[Tensor]:
        return [(gradients[0] + other) / 2]

    with WeightPerturbation(gamma=0.1)(model, loss, mean):
        moved = linear.weight.detach() - weight
    torch.testing.assert_close(moved, 0.1 * weight.norm() * direction / direction.norm())


def test_with_float16_the_loss_is_scaled_and_what_overflows_stays(model: nn.Module):
    linear, seen = model[2], list[Tensor]()  # pyright: ignore[reportIndexIssue]
    weight = linear.weight.detach().clone()
    direction = gradient(weight, linear.bias.detach())

    def overflow(gradients: list[Tensor], reduction: str) -> list[Tensor]:
        assert reduction == "mean"
        seen.append(gradients[0].clone())
        gradients[0][0], gradients[0][1] = torch.inf, torch.nan
        return gradients

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    accelerator = SimpleNamespace(autocast=nullcontext, scaler=scaler, reduce=overflow)
    training: Any = SimpleNamespace(
        perturbation=WeightPerturbation(gamma=0.1), accelerator=accelerator, classifier=model
    )
    objective: Any = SimpleNamespace(loss=lambda model, _: loss(model))
    with perturbation(training, objective, (), 0):  # pyright: ignore[reportArgumentType]
        moved = linear.weight.detach() - weight
    torch.testing.assert_close(seen[0] / 2**20, direction)
    assert not moved[:2].any()
    direction[:2] = 0
    torch.testing.assert_close(moved, 0.1 * weight.norm() * direction / direction.norm())
