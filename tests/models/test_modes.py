import pytest
import torch
from torch import nn

from models.modes import evaluating, frozen


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_evaluating_restores_each_mode(model: nn.Sequential):
    model[1].eval()
    before = [part.training for part in model.modules()]
    with pytest.raises(InterruptedError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise InterruptedError
    assert [part.training for part in model.modules()] == before


def test_frozen_restores_each_weight(model: nn.Sequential):
    model[0].requires_grad_(False)
    before = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(InterruptedError), frozen(model):
        assert not any(weight.requires_grad for weight in model.parameters())
        raise InterruptedError
    assert [weight.requires_grad for weight in model.parameters()] == before


def test_a_pass_made_while_frozen_has_the_gradient_of_its_input_alone(model: nn.Sequential):
    images = torch.ones(1, 3, requires_grad=True)
    with frozen(model):
        logits = model(images)
    logits.sum().backward()
    assert images.grad is not None
    assert all(weight.grad is None for weight in model.parameters())
