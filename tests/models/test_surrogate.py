import pytest
import torch

from robust_submission.models.trn.gradient_map import ESTIMATORS, Estimator, gradient_map
from robust_submission.models.trn.surrogate import Surrogate

GENERATOR = torch.Generator().manual_seed(0)


def build(**options: object) -> Surrogate:
    torch.manual_seed(0)
    model = Surrogate(7, **options)  # pyright: ignore[reportArgumentType]
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 3, 32, 32)),
        ({"widths": (8,), "depth": 1, "stride": 1}, (1, 3, 5, 7)),
        ({"widths": (8, 16, 24), "depth": 1, "stride": 3, "channels": 1}, (3, 1, 31, 26)),
    ],
)
def test_the_backward_pass_written_out_is_autograds(
    options: dict[str, object], shape: tuple[int, ...], estimator: Estimator
):
    model, images = build(**options), torch.rand(shape, generator=GENERATOR)
    expected = gradient_map(images, model, estimator, 3)
    found, logits = model.gradient_map(images, estimator, 3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, model(images))


def test_the_map_needs_no_autograd_and_can_be_differentiated():
    model, images = build(), torch.rand(2, 3, 16, 16, generator=GENERATOR, requires_grad=True)
    found, _ = model.gradient_map(images, "predicted")
    (by_hand,) = torch.autograd.grad(found[:, 0].sum(), images)
    automatic = gradient_map(images, model, "predicted", differentiable=True)
    (expected,) = torch.autograd.grad(automatic[:, 0].sum(), images)
    torch.testing.assert_close(by_hand, expected, rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        assert torch.equal(model.gradient_map(images, "predicted")[0], found)


def test_it_is_small():
    """The surrogate for ConvNeXt-Tiny at 224 pixels: operations of its two passes by hand."""
    model = Surrogate(100, widths=(32, 64), depth=2, stride=8)
    assert sum(weight.numel() for weight in model.parameters()) < 0.25e6
    first, second = 28**2, 14**2
    forward = first * (3 * 64 * 32 + 4 * 9 * 32**2) + second * (4 * 32 * 64 + 4 * 9 * 64**2)
    assert 0.1e9 < 2 * (forward + 64 * 100) < 0.4e9
