"""Early stop: an image leaves the batch after the first point that fools the model."""

import torch
from torch import Tensor

EVERY = {"cpu": 1, "cuda": 5}
"""Steps after which fooled images leave, by type of device. A CPU saves their arithmetic; a GPU
would wait for the CPU, which starts the next kernels only after it has read who is fooled."""


class EarlyStop:
    """Keeps the first fooling point of each image, and now and then drops the fooled from a batch.

    Until it leaves, a fooled image is carried along: its later points are ignored. A network
    prepares itself for every new batch size, which is therefore filled up to a multiple of eight
    with images that are done. How often images leave changes no result of a model that treats every
    image alone.

    Args:
        points: (B, 3, H, W), the start of every image.
    """

    def __init__(self, points: Tensor) -> None:
        self._found = points.clone()
        self._places = torch.arange(len(points), device=points.device)
        self._running = torch.ones_like(self._places, dtype=torch.bool)
        self._every, self._steps = EVERY.get(points.device.type, 5), 0

    def drop(self, fooled: Tensor, points: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """End the runs that are fooled, and drop them if it is time.

        Args:
            fooled: (N,) bool, for the N images still in the batch.
            points: (N, 3, H, W), the points that were tested.
            others: Further tensors of N rows.

        Returns:
            The rows of `points` and of `others` that stay; none once every image was fooled.
        """
        self._keep(points)
        self._running = self._running & ~fooled
        self._steps += 1
        if self._steps % self._every:
            return points, *others
        done_so_far = (~self._running).cumsum(0)
        stays = self._running | (done_so_far <= -self._running.sum() % 8)
        rows = stays.nonzero().squeeze(1)  # waits for the device
        if len(rows) == len(points):
            return points, *others
        self._places, self._running = self._places[rows], self._running[rows]
        return tuple(each[rows] for each in (points, *others))

    def finish(self, points: Tensor) -> Tensor:
        """All B images: the first fooling point of each, else its row of the last `points`."""
        self._keep(points)
        return self._found

    def _keep(self, points: Tensor) -> None:
        """Note where the images are whose runs have not ended; of fixed shape, without waiting."""
        running = self._running[:, None, None, None]
        self._found[self._places] = torch.where(running, points, self._found[self._places])
