"""Run by test_gather.py under torchrun, in each of its processes: loads, gathers and writes.

    torchrun --nproc_per_node 2 two_processes.py FOLDER_OF_IMAGES OUT_FOLDER

Each process writes all that it got, as every process gets everything.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from robust_submission.data.dataset import ImageDataset, Skipped
from robust_submission.data.gather import Values, gather_by_index, gather_skipped
from robust_submission.data.loader import EvaluationLoader, micro_batches
from robust_submission.data.sources import open_source


def predict(accelerator: Accelerator, folder: Path) -> dict[str, np.ndarray]:
    """Per-image sums over the loaders of all processes, and the messages of skipped images."""
    dataset = ImageDataset(open_source("images", folder), None, 8, skip_bad=True)
    loader = EvaluationLoader(
        dataset,
        batch_size=7,
        num_workers=1,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    indices, sums, skipped = list[torch.Tensor](), list[torch.Tensor](), list[Skipped]()
    for batch in micro_batches(loader):
        indices.append(batch["indices"][: batch["count"]])
        sums.append(batch["images"].double().sum(dim=(2, 3))[: batch["count"]])
        skipped += batch["skipped"]
    messages = gather_skipped(accelerator, skipped)
    expected = np.setdiff1d(dataset.indices, [*messages])
    results = gather_by_index(accelerator, torch.cat(indices), {"sums": torch.cat(sums)}, expected)
    return {**results, "skipped": np.array([*messages]), "messages": np.array([*messages.values()])}


def fault_of(accelerator: Accelerator, mine: list[int], values: Values) -> str:
    """The message of a gather in which process 1 repeats or forgets an image."""
    try:
        gather_by_index(accelerator, np.array(mine), values, range(4))
    except RuntimeError as error:
        return str(error)
    return ""


def main(folder: Path, out: Path) -> None:
    """Uneven shares, an empty share, and faults that must end in all processes."""
    accelerator = Accelerator()
    rank, count = accelerator.process_index, accelerator.num_processes
    results = predict(accelerator, folder)
    everything = np.arange(5)
    mine = everything if rank == 0 else everything[:0]
    values = {"squares": mine**2} if rank == 0 else {}
    results["one_sided"] = gather_by_index(accelerator, mine, values, everything)["squares"]
    doubled, lost = ([0, 1, 2], [2, 3]) if rank == 0 else ([2, 3], [0])
    results["doubled"] = np.array(fault_of(accelerator, doubled, {}))
    results["lost"] = np.array(fault_of(accelerator, lost, {}))
    uneven = {"a": np.zeros(rank + 1)}
    results["rows"] = np.array(fault_of(accelerator, [2 * rank, 2 * rank + 1], uneven))
    np.savez(out / f"{rank}_of_{count}.npz", **results)  # pyright: ignore[reportArgumentType]
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
