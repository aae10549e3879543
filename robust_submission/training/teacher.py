"""Labels for extra images that have none, from a trained classifier."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from robust_submission.data.dataset import ImageDataset
from robust_submission.data.gather import gather_by_index
from robust_submission.data.loader import EvaluationLoader, micro_batch_size, micro_batches
from robust_submission.data.sources import StoredSource, match_classes
from robust_submission.models.load import load_checkpoint


def label_images(
    source: StoredSource,
    indices: np.ndarray,
    teacher: Path,
    class_names: Sequence[str],
    accelerator: Accelerator,
    num_workers: int = 0,
) -> StoredSource:
    """The source with the classes that a teacher predicts, as generated images are labelled
    (Carmon et al. 2019). All processes share the work, and get the same labels.

    Args:
        source: Images without labels.
        indices: int64 (N,), which of them to label; the others get the label -1.
        teacher: The folder of a run.
        class_names: The classes of the labels, which must be the teacher's but for their order.
        accelerator: The processes, and the device to predict on.
        num_workers: Processes that read images; does not change the result.

    Raises:
        UserError: There is no such checkpoint, or it has other classes; or an image is unreadable.
    """
    model = load_checkpoint(teacher)
    numbers, _ = match_classes(
        np.arange(len(model.class_names)), model.class_names, class_names, teacher
    )
    loader = EvaluationLoader(
        ImageDataset(source, indices, model.image_size),
        batch_size=micro_batch_size(model.image_size),
        num_workers=num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    model.to(accelerator.device)
    places, predicted = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    hidden = not accelerator.is_main_process
    for batch in tqdm(
        micro_batches(loader), desc="labels", total=loader.num_micro_batches, disable=hidden
    ):
        with torch.no_grad():
            classes = model(batch["images"].to(accelerator.device)).argmax(1).cpu()
        places.append(batch["indices"][: batch["count"]].numpy())
        predicted.append(numbers[classes[: batch["count"]].numpy()])
    mine = {"label": np.concatenate(predicted)}
    found = gather_by_index(accelerator, np.concatenate(places), mine, expected=indices)
    labels = np.full(len(source), -1)
    labels[np.sort(indices)] = found["label"]
    return replace(source, labels=labels, class_names=list(class_names))
