"""Gathers the results of all processes: exactly one per image, in order of the images' index."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from robust_submission.data.dataset import Skipped

Values = Mapping[str, Tensor | np.ndarray]


def _to_array(values: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def from_all_processes(accelerator: Accelerator | None, objects: list) -> list:
    """The lists of all processes one after the other, on each of them."""
    if accelerator is None or accelerator.num_processes == 1:
        return objects
    return gather_object(objects)


def _require_each_once(indices: np.ndarray, expected: np.ndarray) -> None:
    """`indices` is sorted."""
    expected = np.sort(expected)
    if np.array_equal(indices, expected):
        return
    unique, counts = np.unique(indices, return_counts=True)
    faults = {
        "lost": np.setdiff1d(expected, unique),
        "doubled": unique[counts > 1],
        "foreign": np.setdiff1d(unique, expected),
    }
    found = "; ".join(
        f"{len(which)} {fault} ({', '.join(map(str, which[:5]))}{', …' if len(which) > 5 else ''})"
        for fault, which in faults.items()
        if len(which)
    )
    raise RuntimeError(f"expected one result for each of {len(expected)} images, found {found}.")


def gather_by_index(
    accelerator: Accelerator | None,
    indices: Tensor | np.ndarray,
    values: Values,
    expected: Iterable[int] | np.ndarray,
) -> dict[str, np.ndarray]:
    """Collect per-image results over all processes. Every process must call it, and gets all.

    Args:
        accelerator: None for one process.
        indices: int64 (n,): the images of this process; n may differ between processes and be 0.
        values: Named results, each (n, …). A process with n = 0 may pass an empty mapping.
        expected: The indices of all processes together, in any order.

    Returns:
        `values` by name, each (len(expected), …), sorted by index.

    Raises:
        RuntimeError: an expected index is missing, or one came twice or unexpected; or a result
            does not have one row per index. All processes raise it, so that none waits.
    """
    mine = (_to_array(indices), {name: _to_array(array) for name, array in values.items()})
    parts = [part for part in from_all_processes(accelerator, [mine]) if len(part[0])]
    for of_part, results in parts:
        lengths = {name: len(array) for name, array in results.items()}
        if set(lengths.values()) - {len(of_part)}:
            raise RuntimeError(f"expected {len(of_part)} rows of each result, found {lengths}.")
    everything = np.concatenate([of_part for of_part, _ in parts] or [mine[0]])
    order = np.argsort(everything, kind="stable")
    _require_each_once(everything[order], np.fromiter(expected, dtype=np.int64))
    if not parts:
        return mine[1]
    names = parts[0][1]
    return {name: np.concatenate([part[1][name] for part in parts])[order] for name in names}


def gather_skipped(accelerator: Accelerator | None, skipped: Sequence[Skipped]) -> dict[int, str]:
    """Messages of the unreadable images of all processes, by index, in order of index."""
    everything = from_all_processes(accelerator, list(skipped))
    return {image.index: image.message for image in sorted(everything, key=lambda one: one.index)}
