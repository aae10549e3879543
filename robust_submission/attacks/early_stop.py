"""Early stop: an image leaves the batch at the first point that fools the model."""

import torch
from torch import Tensor


class EarlyStop:
    """Drops images from a batch as they are fooled, and keeps for each its first fooling point.

    A network prepares itself for every new batch size. The batch is therefore filled up to a
    multiple of eight with images that are done, whose later points are ignored.

    Args:
        points: (B, 3, H, W), the start of every image.
    """

    def __init__(self, points: Tensor) -> None:
        self._found = torch.empty_like(points)
        self._places = torch.arange(len(points), device=points.device)
        self._running = torch.ones_like(self._places, dtype=torch.bool)

    def drop(self, fooled: Tensor, points: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Drop what is fooled.

        Args:
            fooled: (N,) bool, for the N images still in the batch.
            points: (N, 3, H, W), the points that were tested.
            others: Further tensors of N rows.

        Returns:
            The rows of `points` and of `others` that stay; none once every image is fooled.
        """
        fooled = fooled & self._running
        if not fooled.any():
            return points, *others
        self._found[self._places[fooled]] = points[fooled]
        running = self._running & ~fooled
        done_so_far = (~running).cumsum(0)
        kept = running | (done_so_far <= -running.sum() % 8)
        self._places, self._running = self._places[kept], running[kept]
        return tuple(each[kept] for each in (points, *others))

    def finish(self, points: Tensor) -> Tensor:
        """All B images: the first fooling point of each, else its row of the last `points`."""
        self._found[self._places[self._running]] = points[self._running]
        return self._found
