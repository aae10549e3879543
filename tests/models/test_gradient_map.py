import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.models.trn.gradient_map import (
    ESTIMATORS,
    Estimator,
    gradient_map,
    logit_weights,
    normalized,
)

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 5, generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.rand(4, 3, 8, 8, generator=GENERATOR)


def loss(logits: Tensor, estimator: Estimator, top_k: int | None) -> Tensor:
    """The loss whose gradient the weights are, written out class by class."""
    log_probabilities = logits.log_softmax(1)
    if estimator == "predicted":
        return -log_probabilities.amax(1)
    if estimator == "expected":
        return -(log_probabilities.exp() * log_probabilities).sum(1)
    count = top_k or logits.shape[1]
    return -log_probabilities.topk(count, dim=1).values.mean(1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.5), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8 * 36, 5)).eval()


@pytest.mark.parametrize(
    ("estimator", "top_k"),
    [("predicted", None), ("expected", None), ("average", None), ("average", 2)],
)
def test_the_weights_point_where_the_loss_rises(estimator: Estimator, top_k: int | None):
    logits = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(logits, estimator, top_k).sum(), logits)
    found = logit_weights(LOGITS, estimator, top_k)
    torch.testing.assert_close(F.normalize(found), F.normalize(expected))


def test_the_gradients_of_all_classes_cancel_in_expectation():
    """Why "expected" is the gradient of the expectation, not the expectation of the gradients."""
    probabilities = LOGITS.softmax(1)
    gradients = probabilities[:, None] - torch.eye(5, dtype=torch.float64)
    mean = (probabilities[:, :, None] * gradients).sum(1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-15, rtol=0)
    assert logit_weights(LOGITS, "expected").abs().amax(1).min() > 0.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(st.floats(min_value=0, max_value=600))
def test_a_sure_classifier_still_gives_a_direction(estimator: Estimator, gap: float):
    logits = torch.tensor([[gap, 0.0, -1.0]])
    weights = logit_weights(logits, estimator, 2)
    assert weights.isfinite().all()
    assert weights.abs().max() > 0.1


def test_equal_logits_have_no_entropy_to_gain():
    assert logit_weights(torch.zeros(1, 4), "expected").abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e30])
def test_normalized_has_unit_mean_square(scale: float):
    images = torch.randn(3, 3, 4, 4, generator=GENERATOR)
    images[1] = 0
    found = normalized(images * scale)
    torch.testing.assert_close(found[[0, 2]].pow(2).mean((1, 2, 3)), torch.ones(2))
    assert (found[1] == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_map_is_the_gradient_of_the_loss(model: nn.Module, estimator: Estimator):
    images = IMAGES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(model(images), estimator, 3).sum(), images)
    found = gradient_map(IMAGES, model, estimator, 3)
    torch.testing.assert_close(found, normalized(expected), rtol=1e-3, atol=1e-4)
    assert not found.requires_grad


def test_the_map_needs_no_gradient_mode_and_leaves_no_trace(model: nn.Module):
    expected = gradient_map(IMAGES, model, "predicted")
    with torch.no_grad():
        assert torch.equal(gradient_map(IMAGES, model, "predicted"), expected)
    with torch.inference_mode():
        inside = gradient_map(IMAGES.clone(), model, "predicted")
    assert torch.equal(inside, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient_map(IMAGES, model, "predicted"), expected)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_a_differentiable_map_has_the_slope_of_finite_differences():
    torch.manual_seed(0)
    double = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    direction, probe = torch.randn(2, 1, 3, 8, 8, generator=GENERATOR)

    def project(images: Tensor) -> Tensor:
        return (gradient_map(images, double, "expected", differentiable=True) * probe).sum()

    images = IMAGES[:1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(project(images), images)
    step = 1e-2
    finite = (project(IMAGES[:1] + step * direction) - project(IMAGES[:1] - step * direction)) / (
        2 * step
    )
    assert math.isclose((slope * direction).sum().item(), finite.item(), rel_tol=0.02)
