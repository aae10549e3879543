"""Measuring a classifier over all processes, clean and under attack."""

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from robust_submission.attacks import image_seeds
from robust_submission.data.gather import gather_by_index
from robust_submission.data.loader import EvaluationLoader, MicroBatch, micro_batches

ValidationAttacks = Mapping[str, Callable[..., Tensor]]
"""What is measured beside clean accuracy: names of metrics, and functions from classifier, images,
labels and seeds to attacked images."""


def validate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: EvaluationLoader,
    attacks: ValidationAttacks,
    *,
    seed: int,
    split: str,
) -> dict[str, float]:
    """Mean loss and accuracy over all processes, each image counted once.

    For each attack also the share of images that are classified correctly both clean and attacked.

    Args:
        accelerator: Gathers the results.
        model: The bare model to measure, in any mode; left in eval mode.
        loader: This process's share of the images.
        attacks: The attacks.
        seed: The attacks' seed; random starts depend on it and on the image's index.
        split: Prefix of the names in the result.
    """
    model.eval()
    for buffer in model.buffers():  # batch norm's statistics differ by process: use the first's
        broadcast(buffer)
    batches = tqdm(
        micro_batches(loader),
        desc=split,
        total=loader.num_micro_batches,
        leave=False,
        disable=not accelerator.is_main_process,
    )
    rows = [measure(accelerator, model, batch, attacks, seed) for batch in batches]
    names = rows[0].keys() if rows else ()
    columns = {name: torch.cat([row[name] for row in rows]) for name in names}
    indices = columns.pop("index", torch.empty(0, dtype=torch.int64))
    columns = gather_by_index(accelerator, indices, columns, expected=loader.dataset.indices)
    return {f"{split}_{name}": float(values.mean()) for name, values in columns.items()}


def measure(
    accelerator: Accelerator,
    model: nn.Module,
    batch: MicroBatch,
    attacks: ValidationAttacks,
    seed: int,
) -> dict[str, Tensor]:
    """Index, loss and correctness of each image of a micro-batch without padding, (count,) each."""
    images, labels = batch["images"].to(accelerator.device), batch["labels"].to(accelerator.device)
    labels = labels.clamp(min=0)  # padding has label -1
    with torch.no_grad(), accelerator.autocast():
        logits = model(images).float()
    result = {
        "index": batch["indices"],
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "accuracy": (logits.argmax(1) == labels).double(),
    }
    for name, attack in attacks.items():
        seeds = image_seeds(seed, batch["indices"].clamp(min=0))
        with accelerator.autocast():
            attacked = attack(model, images, labels, seeds)
            with torch.no_grad():
                predictions = model(attacked).argmax(1)
        result[name] = (predictions == labels) * result["accuracy"]
    return {name: values[: batch["count"]].cpu() for name, values in result.items()}
