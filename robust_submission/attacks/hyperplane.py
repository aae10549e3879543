"""The nearest point of a hyperplane within the box 0 to 1: what FAB asks for at each step.

The nearest point, in Linf or L2, moves coordinate i towards the plane by min(level * speed_i,
room_i): speed 1 in Linf, |normal_i| in L2, and the room up to the box's wall. How far that goes
along the normal is concave and piecewise linear in the level, so that Newton's steps from 0 climb
to the least level that reaches the plane, in a handful of passes. pyautoattack sorts each row
instead (Croce & Hein 2020, FAB, section 2.2).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_FLAT = 1e-8
"""What pyautoattack takes for 0 in a normal, in L2."""


def nearest_linf(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """The move from each point to its plane, `normal @ x == offset`, whose largest entry is least.

    Args:
        points: (N, D), within 0 to 1.
        normals: (N, D); where one is 0 the point does not move.
        offsets: (N,).

    Returns:
        (N, D), what to add to the points; where the plane is out of the box, as far as that goes.
    """
    return _nearest(points, normals, offsets, torch.ones_like(offsets).unsqueeze(1))


def nearest_l2(points: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    """As `nearest_linf`, the move of least length; below 1e-8 a normal counts as 0."""
    normals = F.hardshrink(normals, _FLAT)
    return _nearest(points, normals, offsets, normals.abs())


def _nearest(points: Tensor, normals: Tensor, offsets: Tensor, speeds: Tensor) -> Tensor:
    """Moves (N, D) at `speeds`, (N, D) or (N, 1), of the least level that reaches the planes."""
    sizes = normals.abs()
    slopes = sizes * speeds
    missing = torch.linalg.vecdot(normals, points) - offsets
    directions = -normals.sign() * missing.sign().unsqueeze(1)
    rooms = ((directions > 0).to(points.dtype) - points).abs()
    missing = missing.abs()
    least, most = torch.finfo(missing.dtype).tiny, torch.finfo(missing.dtype).max
    level, slope = torch.zeros_like(missing), torch.full_like(missing, torch.inf)
    while True:
        moves = torch.minimum(level.unsqueeze(1) * speeds, rooms)
        before, slope = slope, torch.linalg.vecdot(slopes, (rooms - moves).sign())
        if not (slope < before).any():  # no other coordinate is at its wall; false for NaN
            return directions * moves
        gap = missing - torch.linalg.vecdot(sizes, moves)
        level = (level + gap.clamp_min(0) / slope.clamp_min(least)).clamp_max(most)
