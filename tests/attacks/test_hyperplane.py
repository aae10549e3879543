"""The nearest point of a plane within the box: what makes it the nearest, and pyautoattack's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.fab_projections import projection_l2, projection_linf
from torch import Tensor

from robust_submission.attacks.hyperplane import nearest_l2, nearest_linf

NEAREST = {"linf": nearest_linf, "l2": nearest_l2}
BY_SORTING = {"linf": projection_linf, "l2": projection_l2}


def drawn(seed: int, count: int, reach: float, spread: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points, some at walls; normals, some 0; planes at `reach` of the way to the far corner."""
    generator = torch.Generator().manual_seed(seed)
    points, normals = (torch.rand(5, count, generator=generator) for _ in range(2))
    points[:2] = points[:2].round()
    normals = (2 * normals - 1) * normals**spread
    normals[::2] *= (torch.rand(normals[::2].shape, generator=generator) < 0.7).float()
    up = torch.rand(5, 1, generator=generator) < 0.5
    far = torch.where((normals > 0) == up, 1 - points, points)
    steps = (reach * normals.abs() * far).sum(1)
    return points, normals, (normals * points).sum(1) + torch.where(up[:, 0], steps, -steps)


@pytest.mark.parametrize("norm", NEAREST)
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 300),
    reach=st.floats(0.001, 1.5),
    spread=st.integers(0, 6),
)
def test_reaches_the_plane_by_moves_of_one_level_up_to_the_walls(norm, seed, count, reach, spread):
    points, normals, offsets = drawn(seed, count, reach, spread)
    moves = NEAREST[norm](points, normals, offsets)
    missing = offsets - (normals * points).sum(1)
    moved = points + moves
    assert moved.min() >= 0 and moved.max() <= 1
    left = offsets - (normals * moved).sum(1)
    expected = max(0, 1 - 1 / reach) * missing
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=2e-7 * count)
    towards = normals * missing[:, None]
    assert (moves * towards >= 0).all() and (moves[towards == 0] == 0).all()
    speeds = normals.abs().where(normals.abs() >= 1e-8, 0) if norm == "l2" else normals.sign().abs()
    levels = (moves.abs() / speeds).nan_to_num().amax(1, keepdim=True)
    rooms = torch.where(towards > 0, 1 - points, points)
    torch.testing.assert_close(moves.abs(), torch.minimum(levels * speeds, rooms))


@pytest.mark.parametrize("norm", NEAREST)
@pytest.mark.parametrize("reach", [0.001, 0.03, 0.5, 0.9, 1.2])
def test_agrees_with_sorting(norm, reach):
    case = drawn(0, 3072, reach, spread=2)
    torch.testing.assert_close(NEAREST[norm](*case), BY_SORTING[norm](*case), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("norm", NEAREST)
def test_takes_what_is_no_plane(norm):
    points = torch.full((5, 4), 0.25)
    normals = torch.tensor(
        [[1.0, -1, 2, 0], [0, 0, 0, 0], [torch.nan, 1, 1, 1], [1, 1, 1, 1], [1e30] * 4]
    )
    offsets = torch.tensor([0.6, 1, 0, torch.nan, 1])
    moves = NEAREST[norm](points, normals, offsets)
    alone = NEAREST[norm](points[:1], normals[:1], offsets[:1])
    assert torch.equal(moves[:1], alone) and alone.isfinite().all()
    assert (moves[1] == 0).all()
