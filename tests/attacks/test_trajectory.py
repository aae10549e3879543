"""What is noted of a run of PGD, against runs whose course is known."""

import pytest
import torch
from torch import Tensor

from robust_submission.attacks import PGD
from robust_submission.attacks.losses import margin
from robust_submission.attacks.trajectory import Trajectory

IMAGES, LABELS = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 0])


def watched(model, steps: int = 8, epsilon: float = 0.4) -> tuple[Trajectory, Tensor]:
    path = Trajectory(LABELS, margin)
    options = {"epsilon": epsilon, "steps": steps, "step_size": 0.05, "random_start": False}
    points = PGD(**options, loss="margin", observe=path)(model, IMAGES, LABELS)
    path.end(points, model(points))
    assert torch.equal(points, PGD(**options, loss="margin")(model, IMAGES, LABELS))
    return path, points


def of_mean(function):
    """Two logits: 0, and a function of each image's mean pixel."""
    return lambda images: torch.stack(
        [torch.zeros(len(images)), function(images.mean(dim=(1, 2, 3)))], dim=1
    )


def test_a_steady_rise_and_one_that_has_converged():
    path, _ = watched(of_mean(lambda mean: mean - 0.72))
    # From 0.5 by 0.05 a step to 0.9: 9 losses, quarters of two steps.
    assert path.rise.tolist() == pytest.approx([0.1 / 0.4] * 2)
    assert path.cosine.tolist() == pytest.approx([1.0, 1.0])
    assert path.fooled.all() and not path.silent.any()
    assert path.first.mean().item() == pytest.approx(0.75)  # the first that fools, not the last
    assert watched(of_mean(lambda mean: mean - 0.72), epsilon=0.1)[0].rise.tolist() == [0, 0]
    assert watched(of_mean(lambda mean: mean - 0.72), steps=2)[0].rise.isnan().all()


def test_a_success_on_the_way_is_silent_if_the_gradient_leads_past_it():
    def bump(mean: Tensor) -> Tensor:  # above 0 from 0.62 to 0.68 alone, but its gradient goes on
        height = 0.03 - (mean.detach() - 0.65).abs()
        return height + mean - mean.detach()

    path, points = watched(of_mean(bump))
    assert path.fooled.all() and path.silent.all()
    assert path.first.mean().item() == pytest.approx(0.65)
    assert points.mean().item() == pytest.approx(0.9)


def test_gradients_that_turn_and_gradients_of_nothing():
    turns = iter([1.0, -1.0] * 10)
    path, _ = watched(of_mean(lambda mean: mean * next(turns) - 2))
    assert path.cosine.tolist() == pytest.approx([-1.0, -1.0])
    path, _ = watched(of_mean(lambda mean: mean * 0 - 1))
    assert path.cosine.isnan().all() and path.rise.isnan().all() and not path.fooled.any()
