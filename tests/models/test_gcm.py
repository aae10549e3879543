import numpy as np
import pytest
import torch
from torch import nn

from robust_submission.models.gcm import GCM
from robust_submission.models.surgery import StraightThrough

LEVELS = torch.arange(256, dtype=torch.float32) / 255


def formula(pixels: np.ndarray, omega: float = 1e20, epsilon: float = 1e-8):
    """Equation of the paper and its derivative in float64, at the float32 argument of the sine."""
    argument = (np.float32(omega) * pixels.astype(np.float32)).astype(np.float64)
    value = pixels.astype(np.float64) + epsilon * np.sin(argument)
    return value, 1 + epsilon * omega * np.cos(argument)


def test_forward_is_the_formula():
    value, _ = formula(LEVELS.numpy())
    concealed = GCM()(LEVELS).double().numpy()
    assert np.abs(concealed - value).max() <= 2**-25  # half a float32 step below 1
    assert np.abs(concealed - LEVELS.double().numpy()).max() <= 1.5e-8 + 2**-25


def test_most_levels_come_back_bit_for_bit():
    assert (GCM()(LEVELS) == LEVELS).sum() == 214


def test_backward_is_the_formula():
    _, slope = formula(LEVELS.numpy())
    pixels = LEVELS.clone().requires_grad_()
    gradient = torch.autograd.grad(GCM()(pixels).sum(), pixels)[0].double().numpy()
    np.testing.assert_allclose(gradient, slope, rtol=1e-4)
    assert np.median(np.abs(gradient)) > 1e10
    assert gradient[0] > 1e11  # black keeps its sign


def test_known_factor_restores_every_gradient_sign():
    weight = torch.randn(256, generator=torch.Generator().manual_seed(0))
    pixels = LEVELS.clone().requires_grad_()
    concealed = torch.autograd.grad((GCM()(pixels) * weight).sum(), pixels)[0]
    _, slope = formula(LEVELS.numpy())
    restored = np.sign(concealed.double().numpy() / slope)
    assert (restored == np.sign(weight.numpy())).all()
    assert 0.35 < (concealed.sign() == weight.sign()).float().mean() < 0.65


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_input_is_finite_and_computed_in_float32(dtype: torch.dtype):
    pixels = LEVELS.to(dtype).requires_grad_()
    concealed = GCM()(pixels)
    assert concealed.dtype == torch.float32
    assert torch.equal(concealed, GCM()(pixels.detach().float()))
    gradient = torch.autograd.grad(concealed.sum(), pixels)[0]
    assert gradient.dtype == dtype and gradient.isfinite().all()
    honest = formula(pixels.detach().float().numpy())[1]
    assert (np.sign(gradient.float().numpy()) == np.sign(honest)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype):
    pixels = LEVELS.view(1, 1, 16, 16)
    with torch.autocast("cpu", dtype=dtype):
        concealed = GCM()(pixels)
    assert torch.equal(concealed, GCM()(pixels))


@pytest.mark.parametrize("stage", [GCM(), nn.Identity()])
def test_straight_through_has_the_stage_s_values_and_the_identity_gradient(stage: nn.Module):
    pixels = LEVELS.clone().requires_grad_()
    revealed = StraightThrough(stage)(pixels)
    assert torch.equal(revealed, stage(LEVELS))
    assert torch.equal(torch.autograd.grad(revealed.sum(), pixels)[0], torch.ones(256))


def test_has_no_state_and_the_same_output_in_every_mode():
    module = GCM()
    assert not module.state_dict() and not list(module.parameters())
    assert torch.equal(module.train()(LEVELS), module.eval()(LEVELS))


@pytest.mark.parametrize("module", [GCM(), StraightThrough(GCM())])
def test_exports(module: nn.Module):
    images = torch.rand(2, 3, 8, 8)
    program = torch.export.export(module.eval(), (images,))
    assert torch.equal(program.module()(images), module(images))


def test_refuses_a_step_of_zero():
    with pytest.raises(ValueError, match=r"epsilon > 0, received 1e\+20, 0"):
        GCM(epsilon=0)
