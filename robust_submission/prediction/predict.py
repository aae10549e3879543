"""Classifies every image once: the loop behind inference/predict.py."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from robust_submission.cli.errors import UserError
from robust_submission.data.dataset import Skipped
from robust_submission.data.gather import gather_by_index, gather_skipped
from robust_submission.data.loader import EvaluationLoader, micro_batches
from robust_submission.models.classifier import RobustClassifier
from robust_submission.prediction.writer import Predictions


def predict_images(
    model: RobustClassifier,
    loader: EvaluationLoader,
    accelerator: Accelerator,
    checkpoint: Path,
    probabilities: bool,
) -> tuple[Predictions, list[str]]:
    """Classify the images of a loader, together with the other processes.

    Args:
        model: On the accelerator's device.
        loader: This process's images.
        accelerator: Every process must call this function.
        checkpoint: Where the model is from, for the error.
        probabilities: Whether to return them, the softmax of the logits in float64.

    Returns:
        The predictions of all processes, in the order of the images' indices; and one message for
        each image that could not be read. The same in every process.

    Raises:
        UserError: a logit is NaN or infinite; an image cannot be read, unless the loader skips it.
    """
    results, unreadable = _classify(model, loader, accelerator, checkpoint, probabilities)
    skipped = gather_skipped(accelerator, unreadable)
    kept = np.setdiff1d(loader.dataset.indices, list(skipped))
    gathered = gather_by_index(accelerator, results.pop("index"), results, expected=kept)
    predictions = Predictions(
        images=loader.dataset.source.ids[kept].tolist(),
        labels=gathered["label"],
        probabilities=gathered.get("probabilities"),
    )
    return predictions, [*skipped.values()]


@torch.inference_mode()
def _classify(
    model: RobustClassifier,
    loader: EvaluationLoader,
    accelerator: Accelerator,
    checkpoint: Path,
    probabilities: bool,
) -> tuple[dict[str, torch.Tensor], list[Skipped]]:
    """This process's results.

    Returns:
        `index` and `label`, int64 (n,), with `probabilities` also float32 (n, num_classes); and
        the images that could not be read.
    """
    none = torch.empty(0, dtype=torch.int64)
    columns = {"index": [none], "label": [none]}
    if probabilities:
        columns["probabilities"] = [torch.empty(0, len(model.class_names))]
    skipped = list[Skipped]()
    hidden = not accelerator.is_main_process
    with tqdm(total=loader.num_images, unit="image", disable=hidden) as bar:
        for batch in micro_batches(loader):
            count = batch["count"]
            logits = model(batch["images"].to(accelerator.device))[:count].cpu()
            indices = batch["indices"][:count]
            if len(wrong := indices[~logits.isfinite().all(1)]):
                name = loader.dataset.source.ids[int(wrong[0])]
                raise UserError(
                    f"{checkpoint}: expected finite logits, found NaN or infinity for {name}."
                )
            columns["index"].append(indices)
            columns["label"].append(logits.argmax(1))
            if probabilities:
                columns["probabilities"].append(logits.double().softmax(1).float())
            skipped += batch["skipped"]
            bar.update(count + len(batch["skipped"]))
    return {name: torch.cat(parts) for name, parts in columns.items()}, skipped
