"""Images that are attacked together, in batches as large as memory allows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from robust_submission.cli.errors import UserError, log


@dataclass(frozen=True, kw_only=True)
class ImageChunk:
    """Images that are always attacked together, padded to one shape."""

    number: int
    rows: np.ndarray
    """(count,), int64: their places among all evaluated images."""
    images: Tensor
    """(size, 3, H, W), float32, 0 to 1; zeros from `count` on."""
    labels: Tensor
    """(size,), int64."""
    indices: np.ndarray
    """(count,), int64: their places in the source, from which their seeds follow."""
    digest: str
    """Names these pixels and labels."""

    @property
    def count(self) -> int:
        """The number of images, without the padding."""
        return len(self.indices)


class FittingBatches:
    """Calls a function on as many images at once as memory allows.

    A batch that does not fit is halved, and later batches are no larger. The results of the parts
    are concatenated in order.

    Args:
        limit: The largest batch that is tried.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`work(rows)`, in parts if necessary.

        Args:
            work: Maps the places of some images to one result for each, (N, …).
            rows: (B,), int64, places of images; at least one.

        Raises:
            UserError: not even one image fits.
        """
        done, results = 0, list[Tensor]()
        while done < len(rows):
            part = rows[done : done + self.limit]
            try:
                results.append(work(part))
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                done += len(part)
                continue
            self._halve(len(part), reason)  # outside: the error would keep its tensors alive
        return torch.cat(results)

    def _halve(self, size: int, reason: str) -> None:
        clear_device_cache(garbage_collection=True)
        if size == 1:
            line = reason.strip().splitlines()[0] if reason.strip() else "out of memory"
            raise UserError(f"memory: expected room for at least one image, found: {line}")
        self.limit = size // 2
        log.warning("out of memory with %d images at once; continuing with %d.", size, self.limit)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
