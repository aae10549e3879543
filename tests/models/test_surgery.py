from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from robust_submission.models.surgery import evaluating, frozen


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


def modes(model: nn.Sequential) -> list[bool]:
    return [part.training for part in model.modules()]


def learning(model: nn.Sequential) -> list[bool]:
    return [weight.requires_grad for weight in model.parameters()]


@pytest.mark.parametrize(("context", "states"), [(evaluating, modes), (frozen, learning)])
def test_each_part_gets_its_own_state_back(
    context: Callable[[nn.Module], AbstractContextManager[None]],
    states: Callable[[nn.Sequential], list[bool]],
    model: nn.Sequential,
):
    model[0].eval().requires_grad_(False)
    before = states(model)
    with pytest.raises(InterruptedError), context(model):
        assert not any(states(model))
        raise InterruptedError
    assert any(before) and not all(before) and states(model) == before


def test_a_pass_made_while_frozen_has_the_gradient_of_its_input_alone(model: nn.Sequential):
    images = torch.ones(1, 3, requires_grad=True)
    with frozen(model):
        logits = model(images)
    logits.sum().backward()
    assert images.grad is not None
    assert all(weight.grad is None for weight in model.parameters())
