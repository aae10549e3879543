"""Going on with smaller batches where memory runs out."""

import sys
from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from robust_submission.cli.errors import UserError


class FittingBatches:
    """Calls a function on as many images at once as memory allows.

    A batch that does not fit is halved, for good: what did not fit once is not tried again. The
    results of the parts are put together in order.

    Args:
        limit: The most images tried at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`work(rows)`, in parts where it has to be.

        Args:
            work: From the places of some images to one result for each, (N, …).
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
                if not _out_of_memory(error):
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
            raise UserError(f"expected memory for one image at least, found: {line}")
        self.limit = size // 2
        print(
            f"out of memory with {size} images at once: going on with {self.limit}.",
            file=sys.stderr,
        )


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
