"""Write the challenge's prediction file; the same bytes every time.

    python inference/predict.py --out sub.csv --checkpoint runs/quickstart --images test_images

Without --images, the test images of the run's own data. The batch size, the workers and the number
of processes (torchrun, accelerate launch) change the speed and nothing else.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import check_writable
from robust_submission.data.gather import gather_by_index, gather_skipped
from robust_submission.data.loader import (
    EvaluationLoader,
    ImageDataset,
    Skipped,
    evaluation_loader,
    micro_batches,
)
from robust_submission.data.run_data import open_run_data
from robust_submission.data.sources import Source, open_source
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import load_checkpoint
from robust_submission.prediction.formats import Predictions, choose_format, write_predictions
from robust_submission.prediction.layout import plan_layout
from robust_submission.runtime import start_accelerator


@dataclass(kw_only=True)
class Options:
    """A prediction."""

    out: Path
    """The prediction file."""
    checkpoint: Path = Path("runs/quickstart")
    """A run folder, or any folder with config.json and model.safetensors."""
    trn: Path | None = None
    """Run folder of a TRN to put before the classifier."""
    images: Path | None = None
    """Folder of images, nested or flat; the run's own test images if not given."""
    format: Literal["csv", "json", "neurips"] | None = None
    """Profile of the file; by default its ending decides (.csv, .json)."""
    template: Path | None = None
    """A sample_submission.csv that gives header, ids and order."""
    probabilities: bool = False
    """Also write one probability column per class, to six decimals."""
    skip_bad: bool = False
    """Leave out unreadable images and list them, instead of stopping at the first."""
    limit: int | None = None
    """Predict the first N images only."""
    batch_size: int = 64
    """Images that each process reads at a time."""
    num_workers: int = 0
    """Processes that read images."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit: expected at least 1, found {self.limit}.")


def classify(
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

    Raises:
        UserError: a logit is NaN or infinite; it names the checkpoint and the image.
    """
    columns: dict[str, list[torch.Tensor]] = {"index": [], "label": []}
    if probabilities:
        columns["probabilities"] = []
    skipped = list[Skipped]()
    with (
        torch.inference_mode(),
        tqdm(total=loader.num_images, unit="image", disable=not accelerator.is_main_process) as bar,
    ):
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
    return {name: torch.cat(parts) for name, parts in columns.items() if parts}, skipped


def predict(options: Options) -> None:
    """Classify each image once and write the prediction file."""
    format = choose_format(check_writable(options.out), options.format)
    accelerator = start_accelerator()
    source = _open_source(options)
    indices = np.arange(len(source))[: options.limit]
    left_out = source.ids[len(indices) :].tolist()
    model = load_checkpoint(options.checkpoint, options.trn).to(accelerator.device)
    optimize_for_cpu(model, channels_last=accelerator.device.type == "cpu")
    layout = plan_layout(  # before the work, so that a bad template shows at once
        format,
        source.ids[indices].tolist(),
        model.class_names,
        options.template,
        options.probabilities,
        left_out,
    )
    loader = _build_loader(options, source, indices, model.image_size, accelerator)
    probabilities = options.probabilities or layout.needs_probabilities
    columns, unreadable = classify(model, loader, accelerator, options.checkpoint, probabilities)
    skipped = gather_skipped(accelerator, unreadable)
    kept = np.setdiff1d(indices, list(skipped))
    mine = columns.pop("index", torch.empty(0, dtype=torch.int64))
    results = gather_by_index(accelerator, mine, columns, expected=kept)
    for message in skipped.values() if accelerator.is_main_process else ():
        print(f"skipped: {message}")
    if not len(kept):
        raise UserError(
            f"{options.images or options.checkpoint}: expected a readable image, found none."
        )
    if accelerator.is_main_process:
        predictions = Predictions(
            ids=source.ids[kept],
            labels=results["label"],
            class_names=model.class_names,
            probabilities=results.get("probabilities"),
        )
        left_out += source.ids[list(skipped)].tolist()
        write_predictions(options.out, predictions, format, options.template, left_out)
        print(f"{options.out}: {len(kept)} rows")
    accelerator.end_training()


def _open_source(options: Options) -> Source:
    if options.images is None:
        return open_run_data(options.checkpoint, "test")
    return open_source("images", options.images)


def _build_loader(
    options: Options, source: Source, indices: np.ndarray, size: int, accelerator: Accelerator
) -> EvaluationLoader:
    return evaluation_loader(
        ImageDataset(source, indices, size, skip_bad=options.skip_bad),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


if __name__ == "__main__":
    run(predict, Options)
