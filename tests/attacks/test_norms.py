"""Projections, directions and draws against numpy and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robust_submission.attacks.base import Draws, image_seeds
from robust_submission.attacks.norms import L1, NORMS

SIZES = {
    "linf": lambda v: np.abs(v).max(axis=1),
    "l2": lambda v: np.sqrt((v**2).sum(axis=1)),
    "l1": lambda v: np.abs(v).sum(axis=1),
    "l1-dense": lambda v: np.abs(v).sum(axis=1),
}
DUALS = {
    "linf": lambda v: np.abs(v).sum(axis=1),
    "l2": lambda v: np.sqrt((v**2).sum(axis=1)),
    "l1": lambda v: np.abs(v).max(axis=1),
}


def flat(tensor: Tensor) -> np.ndarray:
    return tensor.flatten(1).double().numpy()


def cases():
    """Images with many pixels at the box's walls, points far and near, budgets of all sizes."""
    return st.tuples(
        st.integers(0, 2**32 - 1), st.floats(0.01, 30), st.floats(0.01, 3), st.integers(1, 6)
    )


def drawn(seed: int, spread: float, side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 3, side, side, generator=generator)
    images[:2] = images[:2].round()
    return images, images + spread * torch.randn(images.shape, generator=generator)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_projection_is_inside_ball_and_box_and_leaves_the_inside_alone(norm, case):
    seed, epsilon, spread, side = case
    images, points = drawn(seed, spread, side)
    projected = NORMS[norm].project(points, images, epsilon)
    assert projected.min() >= 0 and projected.max() <= 1
    rounding = 6e-8 * images[0].numel()  # a float32 pixel's, summed
    assert (SIZES[norm](flat(projected) - flat(images)) <= epsilon * (1 + 1e-5) + rounding).all()
    again = NORMS[norm].project(projected, images, epsilon)
    np.testing.assert_allclose(again, projected, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_l1_projection_is_the_nearest_point_of_ball_and_box(case):
    seed, epsilon, spread, side = case
    images, points = drawn(seed, spread, side)
    found = flat(NORMS["l1"].project(points, images, epsilon))
    clean, wanted = flat(images), flat(points) - flat(images)
    room = np.where(wanted > 0, 1 - clean, clean)
    for row in range(len(images)):  # bisection on the threshold, in double precision

        def moved(threshold, row=row):
            return np.minimum(room[row], np.maximum(np.abs(wanted[row]) - threshold, 0))

        low, high = 0.0, np.abs(wanted[row]).max() + 1
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if moved(middle).sum() > epsilon else (low, middle)
        threshold = 0.0 if moved(0).sum() <= epsilon else high
        expected = clean[row] + np.sign(wanted[row]) * moved(threshold)
        np.testing.assert_allclose(found[row], expected, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_l1_projection_without_walls_is_duchis(case):
    seed, epsilon, spread, side = case
    _, points = drawn(seed, spread, side)
    # Walls far away: a perturbation of at most 0.5 around 0.5 never reaches them.
    images = torch.full_like(points, 0.5)
    points = images + (points - points.mean()).clamp(-0.4, 0.4)
    found = flat(NORMS["l1"].project(points, images, epsilon)) - 0.5
    for row, wanted in enumerate(flat(points) - 0.5):
        if np.abs(wanted).sum() <= epsilon:
            np.testing.assert_allclose(found[row], wanted, atol=1e-6)
            continue
        ordered = np.sort(np.abs(wanted))[::-1]
        excess = (np.cumsum(ordered) - epsilon) / np.arange(1, len(ordered) + 1)
        threshold = excess[np.nonzero(ordered > excess)[0][-1]]
        expected = np.sign(wanted) * np.maximum(np.abs(wanted) - threshold, 0)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_l1_projection_keeps_its_precision_at_full_size():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 224, 224, generator=generator)
    points = images + torch.randn(images.shape, generator=generator)
    size = np.abs(flat(NORMS["l1"].project(points, images, 1600)) - flat(images)).sum()
    assert abs(size - 1600) < 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_direction_is_of_size_one_and_reaches_the_dual_norm(norm):
    gradient = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    direction = NORMS[norm].direction(gradient, torch.full_like(gradient, 0.5))
    np.testing.assert_allclose(SIZES[norm](flat(direction)), 1, rtol=1e-5)
    gain = (flat(gradient) * flat(direction)).sum(axis=1)
    np.testing.assert_allclose(gain, DUALS[norm](flat(gradient)), rtol=1e-5)


def test_l1_direction_moves_the_steepest_values_by_the_same_amount():
    gradient = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = torch.full_like(gradient, 0.5)
    single = flat(L1(density=1 / 192).direction(gradient, images))
    assert ((single != 0).sum(axis=1) == 1).all()
    gain = (flat(gradient) * single).sum(axis=1)
    np.testing.assert_allclose(gain, DUALS["l1"](flat(gradient)), rtol=1e-6)
    tenth = flat(L1(density=0.1).direction(gradient, images))
    steepest = np.argsort(-np.abs(flat(gradient)), axis=1)[:, :19]
    expected = np.zeros_like(tenth)
    signs = np.sign(np.take_along_axis(flat(gradient), steepest, axis=1)) / 19
    np.put_along_axis(expected, steepest, signs, axis=1)
    np.testing.assert_allclose(tenth, expected, rtol=1e-6)


def test_l1_direction_passes_over_values_at_their_bound():
    gradient = torch.arange(1.0, 13).view(1, 3, 2, 2)
    images = torch.full_like(gradient, 0.5)
    images[0, 2, 1, 1] = 1  # the steepest cannot rise
    direction = L1(density=0.01).direction(gradient, images)
    assert direction.flatten().tolist() == [0] * 10 + [1, 0]
    dense = NORMS["l1-dense"].direction(gradient, images)
    torch.testing.assert_close(dense, gradient / 78)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e12, 1e30])
def test_direction_does_not_depend_on_the_gradients_scale(norm, scale):
    gradient = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    images = torch.full_like(gradient, 0.5)
    plain = NORMS[norm].direction(gradient, images)
    torch.testing.assert_close(NORMS[norm].direction(gradient * scale, images), plain)
    assert NORMS[norm].direction(0 * gradient, images).count_nonzero() == 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_start_is_uniform_in_the_ball(norm):
    """In n dimensions (size / epsilon) ** n is uniform from 0 to 1, and the mean is the centre."""
    images = torch.full((4000, 3, 1, 1), 0.5)
    draws = Draws.choose(len(images), torch.Generator().manual_seed(0), None, 0)
    moved = flat(NORMS[norm].random_start(images, 0.3, draws)) - 0.5
    share = np.sort((SIZES[norm](moved) / 0.3) ** 3)
    uniform = (np.arange(len(share)) + 0.5) / len(share)
    assert np.abs(share - uniform).max() < 1.95 / len(share) ** 0.5  # Kolmogorov, 0.1 %
    assert np.abs(moved.mean(axis=0)).max() < 0.01
    assert np.abs(np.corrcoef(moved.T) - np.eye(3)).max() < 0.06


def test_image_seeds_are_a_function_of_seed_and_index():
    seeds = image_seeds(7, range(500))
    assert seeds.dtype == torch.int64 and (seeds >= 0).all()
    assert len(set(seeds.tolist())) == 500
    torch.testing.assert_close(image_seeds(7, [40, 3]), seeds[[40, 3]])
    assert not torch.equal(image_seeds(8, range(500)), seeds)


def test_draws_refuse_two_sources_and_a_wrong_count():
    with pytest.raises(ValueError, match="expected a generator or seeds"):
        Draws.choose(2, torch.Generator(), torch.tensor([1, 2]), 0)
    with pytest.raises(ValueError, match=r"shape \(2,\).*\(3,\)"):
        Draws.choose(2, None, torch.tensor([1, 2, 3]), 0)
