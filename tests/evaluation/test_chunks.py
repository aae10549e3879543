"""Batches that do not fit are halved, and nothing else is swallowed."""

import pytest
import torch
from torch import Tensor

from robust_submission.evaluation.chunks import FittingBatches

CPU = "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: 9 bytes."


def squares(most: int, sizes: list[int], error: Exception):
    def work(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        if len(rows) > most:
            raise error
        return rows**2

    return work


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA: no memory"), RuntimeError(CPU)])
def test_halves_until_it_fits_and_remembers(error: Exception):
    fit, sizes = FittingBatches(32), list[int]()
    rows = torch.arange(32)
    assert torch.equal(fit(squares(10, sizes, error), rows), rows**2)
    assert sizes == [32, 16, 8, 8, 8, 8]
    sizes.clear()
    fit(squares(10, sizes, error), rows[:12])
    assert sizes == [8, 4]


def test_one_image_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="expected room for at least one image"):
        FittingBatches(4)(squares(0, [], torch.OutOfMemoryError("none")), torch.arange(3))


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"):
        FittingBatches(4)(squares(0, [], RuntimeError("shapes differ")), torch.arange(3))
