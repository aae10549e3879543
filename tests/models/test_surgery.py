from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from robust_submission.models.classifier import reveal, undefended
from robust_submission.models.gcm import GCM
from robust_submission.models.surgery import Compiled, evaluating, frozen


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


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # pyright: ignore[reportReturnType]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def prepared(model: nn.Module) -> nn.Module:
    """As accelerate's `prepare` does for mixed precision."""
    own = type(model).forward

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        return 2 * own(self, images)

    model.forward = MethodType(forward, model)
    return model


@pytest.mark.parametrize(("wrap", "factor"), [(compiled, 1), (compiled_in_place, 1), (prepared, 2)])
def test_what_is_exchanged_counts_in_a_wrapped_model_too(
    wrap: Callable[[nn.Module], nn.Module], factor: float
):
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    model = wrap(nn.Sequential(GCM(), inner))
    images = torch.rand(2, 3, 2, 2, requires_grad=True)
    (honest,) = torch.autograd.grad(inner(images).sum(), images)
    for view in (reveal(model), undefended(model)):
        torch.testing.assert_close(view(images), factor * inner(images))
        (found,) = torch.autograd.grad(view(images).sum(), images)
        torch.testing.assert_close(found, factor * honest)


def test_compiled_a_network_sees_few_sizes_and_may_overwrite_its_outputs(
    monkeypatch: pytest.MonkeyPatch,
):
    network, memory, seen = nn.Linear(48, 4).double(), dict[int, Tensor](), list[int]()
    for weight in network.parameters():
        weight.requires_grad_(False)

    class Graph(nn.Module):
        """Every run of one size writes into the same tensor, as a CUDA graph's."""

        def forward(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            outputs = network(images.flatten(1))
            if outputs.requires_grad:
                return outputs
            return memory.setdefault(len(images), torch.empty_like(outputs)).copy_(outputs)

    monkeypatch.setattr(torch, "compile", lambda network, mode: network)
    compiled = Compiled(Graph(), None)
    batches = [torch.rand(count, 3, 4, 4).double() for count in (1, 3, 8, 9, 16, 17)]
    kept = [compiled(images) for images in batches]
    assert seen == [8, 8, 8, 16, 16, 32]
    for images, outputs in zip(batches, kept, strict=True):
        torch.testing.assert_close(outputs, network(images.flatten(1)))
        images.requires_grad_()
        (found,) = torch.autograd.grad(compiled(images).square().sum(), images)
        (expected,) = torch.autograd.grad(network(images.flatten(1)).square().sum(), images)
        torch.testing.assert_close(found, expected)
