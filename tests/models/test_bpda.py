"""Automatic BPDA finds the gradient of the undefended network behind defences of many kinds."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_submission.attacks import input_gradient
from robust_submission.attacks.losses import margin
from robust_submission.models.bpda import BPDA, Through

torch.manual_seed(0)
BODY = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU()).requires_grad_(False)
HEAD = nn.Sequential(nn.Flatten(), nn.Linear(288, 4)).requires_grad_(False)
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
EVERYTHING = Through.OPERATIONS | Through.IMAGES


class Backward(torch.autograd.Function):
    """The identity with another gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradients[0], None


def network(images: Tensor) -> Tensor:
    return HEAD(BODY(images))


def out_of_torch(images: Tensor) -> Tensor:
    copies = [torch.from_numpy(each.numpy() * 1.0) for each in images.detach()]
    return torch.stack(copies)


def hooked(images: Tensor) -> Tensor:
    images = images * 1.0
    if images.requires_grad:
        images.register_hook(torch.neg)
    return images


def written(images: Tensor) -> Tensor:
    return (images * 100).round_() / 100


def purified(images: Tensor) -> Tensor:
    points = images.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(network(points).logsumexp(1).sum(), points)
    return (points - 1e-4 * gradient).detach()


def defence(text: str) -> Callable[[Tensor], Tensor]:
    return {
        "integers": lambda x: (x * 255).to(torch.uint8).float() / 255,
        "comparisons": lambda x: (x[..., None] > torch.arange(0.05, 1, 0.05)).float().mean(-1),
        "masks": lambda x: torch.stack([x > k / 20 for k in range(1, 20)], -1).float().mean(-1),
        "detached": lambda x: x.detach() + 0 * x,
        "reversed": lambda x: 2 * x.detach() - x,
        "sine": lambda x: x + 1e-6 * (1e18 * x).sin(),
        "backward": lambda x: Backward.apply(x, -1.0),
        "zero backward": lambda x: Backward.apply(x, 0.0),
        "round": lambda x: (x * 15).round() / 15,
        "in place": written,
        "hook": hooked,
        "numpy": out_of_torch,
        "no_grad": torch.no_grad()(lambda x: x * 1.0),
        "purified": purified,
    }[text]


AT_INPUT = [
    *(
        "integers",
        "comparisons",
        "masks",
        "detached",
        "reversed",
        "sine",
        "backward",
        "zero backward",
    ),
    *("round", "in place", "hook", "numpy", "no_grad", "purified"),
]
DEFENCES: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: lambda x, name=name: network(defence(name)(x)) for name in AT_INPUT},
    "round in features": lambda x: HEAD((64 * BODY(x)).round() / 64),
    "detach in features": lambda x: HEAD(BODY(x).detach()),
    "backward in features": lambda x: HEAD(Backward.apply(BODY(x), -1.0)),
    "saturated softmax": lambda x: (1e5 * network(x)).softmax(1),
    "saturated tanh": lambda x: (1e5 * network(x)).tanh(),
    "votes": lambda x: F.one_hot(network(x).argmax(1), 4).float(),
    "rounded probabilities": lambda x: network(x).softmax(1).round(decimals=3),
}


def direction(model: Callable[[Tensor], Tensor]) -> Tensor:
    labels = network(IMAGES).argmax(1)
    gradient, _ = input_gradient(model, IMAGES, labels, margin)
    return F.normalize(gradient.flatten(1))


@pytest.mark.parametrize("name", DEFENCES)
def test_the_gradient_is_that_of_the_undefended_network(name: str):
    defended = BPDA(DEFENCES[name], EVERYTHING)
    assert (direction(defended) * direction(network)).sum(1).median() > 0.9  # but for ties
    assert defended.substituted and defended.optimises == (name == "purified")
    with torch.no_grad():
        expected = DEFENCES[name](IMAGES)
        assert torch.equal(defended(IMAGES).argmax(1), expected.argmax(1))
    if name in AT_INPUT:
        torch.testing.assert_close(defended(IMAGES.clone().requires_grad_()), expected)


def test_an_honest_model_keeps_its_gradient_to_the_bit():
    class Gate(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features * (features > 0)  # a mask has no gradient, and needs none

    honest = nn.Sequential(BODY, Gate(), nn.BatchNorm2d(8), nn.Dropout(), HEAD).eval()
    watched = BPDA(honest, Through.OPERATIONS)
    assert torch.equal(direction(watched), direction(honest))
    assert not watched.substituted


def test_what_was_passed_through_is_named_with_its_line():
    watched = BPDA(DEFENCES["round"], Through.OPERATIONS)
    direction(watched)
    (found,) = watched.substituted
    assert found.startswith("round in test_bpda.py:")


def test_masks_are_passed_through_on_demand():
    def winners(images: Tensor) -> Tensor:
        features = BODY(images)
        kept = features >= features.flatten(1).quantile(0.9, dim=1)[:, None, None, None]
        return HEAD(features * kept)

    masked, passed = (
        direction(BPDA(winners, through))
        for through in (Through.OPERATIONS, Through.OPERATIONS | Through.MASKS)
    )
    assert torch.equal(masked, direction(winners))
    assert (passed * direction(network)).sum(1).mean() > (masked * direction(network)).sum(1).mean()


def test_a_map_out_of_torch_passes_on_what_changes_its_output():
    def blurred(images: Tensor) -> Tensor:
        return torch.stack(
            [images.roll(each, (2, 3)) for each in product((-1, 0, 1), repeat=2)]
        ).mean(0)

    def out_and_back(images: Tensor) -> Tensor:
        pixels = blurred(images.detach()).numpy()
        return network(torch.from_numpy(np.round(255 * pixels) / 255))

    expected = direction(lambda images: network(blurred(images)))
    through = Through.OPERATIONS | Through.IMAGES
    assert (direction(BPDA(out_and_back, through)) * expected).sum(1).min() > 0.95
    assert (direction(network) * expected).sum(1).max() < 0.9
