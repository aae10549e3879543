"""Write the challenge's prediction file; the same bytes every time.

    python inference/predict.py --out sub.csv --checkpoint runs/quickstart --images test_images

Without --images, the test images of the run's own data. The batch size, the workers and the number
of processes (torchrun, accelerate launch) change the speed and nothing else.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError, log
from robust_submission.cli.files import check_writable
from robust_submission.data.dataset import ImageDataset
from robust_submission.data.loader import EvaluationLoader
from robust_submission.data.sources import Source, open_run_data, open_source
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import load_checkpoint
from robust_submission.prediction.layout import plan_layout, read_template
from robust_submission.prediction.schema import Format, choose_format
from robust_submission.prediction.writer import predict_images, write_predictions
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
    format: Format | None = None
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


def predict(options: Options) -> None:
    """Classify each image once and write the prediction file."""
    format = choose_format(check_writable(options.out), options.format)
    template = read_template(options.template, format) if options.template else None
    accelerator = start_accelerator()
    source = _open_source(options)
    indices = np.arange(len(source))[: options.limit]
    model = load_checkpoint(options.checkpoint, options.trn).to(accelerator.device)
    optimize_for_cpu(model, channels_last=accelerator.device.type == "cpu")
    layout = plan_layout(
        format,
        source.ids[indices].tolist(),
        model.class_names,
        template,
        options.probabilities,
        left_out=source.ids[len(indices) :].tolist(),
    )
    loader = EvaluationLoader(
        ImageDataset(source, indices, model.image_size, skip_bad=options.skip_bad),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    predictions, skipped = predict_images(
        model, loader, accelerator, options.checkpoint, layout.needs_probabilities
    )
    if accelerator.is_main_process:
        for message in skipped:
            log.warning("skipped: %s", message)
    count = len(predictions.images)
    if not count:
        place = options.images or options.checkpoint
        raise UserError(f"{place}: expected a readable image, found none.")
    if accelerator.is_main_process:
        write_predictions(options.out, predictions, layout)
        print(f"{options.out}: {count} rows")
    accelerator.end_training()


def _open_source(options: Options) -> Source:
    if options.images is None:
        return open_run_data(options.checkpoint, "test")
    return open_source("images", options.images)


if __name__ == "__main__":
    run(predict, Options)
