"""Measuring a classifier over all processes, clean and under attack."""

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from robust_submission.attacks.base import image_seeds
from robust_submission.data.gather import gather_by_index
from robust_submission.data.loader import EvaluationLoader, MicroBatch, micro_batches
from robust_submission.training.state import Training


def validate(
    training: Training, model: nn.Module, loader: EvaluationLoader, split: str
) -> dict[str, float]:
    """Mean loss and accuracy over all processes, each image counted once.

    The same under each of `validation_attacks`, of images that are right without it too.

    Args:
        training: The run.
        model: The bare model to measure, in any mode; left in eval mode.
        loader: This process's share of the images.
        split: Prefix of the names in the result.
    """
    accelerator = training.accelerator
    model.eval()
    for buffer in model.buffers():  # batch norm's statistics are of a process's share: the first's
        broadcast(buffer)
    rows = list[dict[str, Tensor]]()
    batches = tqdm(
        micro_batches(loader),
        desc=split,
        total=loader.num_micro_batches,
        leave=False,
        disable=not accelerator.is_main_process,
    )
    for batch in batches:
        rows.append(measure(training, model, batch))
    names = rows[0].keys() if rows else ()
    columns = {name: torch.cat([row[name] for row in rows]) for name in names}
    indices = columns.pop("index", torch.empty(0, dtype=torch.int64))
    columns = gather_by_index(accelerator, indices, columns, expected=loader.dataset.indices)
    return {f"{split}_{name}": float(values.mean()) for name, values in columns.items()}


def measure(training: Training, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
    """Index, loss and correctness of each true image of a micro-batch, shape (count,) each."""
    accelerator = training.accelerator
    images, labels = batch["images"].to(accelerator.device), batch["labels"].to(accelerator.device)
    labels = labels.clamp(min=0)  # padding has label -1
    with torch.no_grad(), accelerator.autocast():
        logits = model(images).float()
    result = {
        "index": batch["indices"],
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "accuracy": (logits.argmax(1) == labels).double(),
    }
    for name, attack in training.validation_attacks.items():
        seeds = image_seeds(training.recipe.seed, batch["indices"].clamp(min=0))
        with accelerator.autocast():
            attacked = attack(model, images, labels, seeds)
            with torch.no_grad():
                predictions = model(attacked).argmax(1)
        result[name] = (predictions == labels) * result["accuracy"]  # right without it, too
    return {name: values[: batch["count"]].cpu() for name, values in result.items()}
