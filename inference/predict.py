"""Write the challenge's prediction file; the same bytes every time.

    python inference/predict.py --out sub.csv --checkpoint runs/quickstart --images test_images

Without --images, the test images of the run's own data. The batch size, the workers and the number
of processes (torchrun, accelerate launch) change the speed and nothing else.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError, log
from robust_submission.cli.files import (
    atomic_write,
    check_writable,
    checkpoint_files,
    write_archive,
)
from robust_submission.prediction.layout import plan_layout
from robust_submission.prediction.schema import (
    Answers,
    Format,
    Labels,
    Layout,
    choose_format,
    find_class,
)
from robust_submission.prediction.template import read_template

if TYPE_CHECKING:
    from accelerate import Accelerator

    from robust_submission.data.loader import EvaluationLoader
    from robust_submission.data.sources import Source
    from robust_submission.prediction.writer import Predictions


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
    """Profile of the file; by default its ending decides (.csv, .json). score: image_name,score."""
    template: Path | None = None
    """A sample_submission.csv that gives header, ids and order."""
    labels: Labels | None = None
    """Write labels as class names or as indices from 0; by default as the template has them,
    without one as indices."""
    score_class: str | None = None
    """Class, by name or index, whose probability is the score; by default the one that the
    template's column is called after, else of two the second."""
    probabilities: bool = False
    """Also write one probability column per class, to six decimals."""
    zip: bool = False
    """Also write a zip, beside the file and of its name, with the file at its top level."""
    skip_bad: bool = False
    """Leave out unreadable images and list them, instead of stopping at the first."""
    bad_label: str | None = None
    """Give each unreadable image a row with this label: a class name or index, or frequent for the
    class that is predicted most. Its probabilities are equal; a score is 1 or 0, for frequent
    1 / classes. What is there of a truncated file is read."""
    max_pixels: int | None = None
    """The most pixels of an image that is read; by default Pillow's limit, 89,478,485."""
    limit: int | None = None
    """Predict the first N images only."""
    batch_size: int = 64
    """Images that each process reads at a time."""
    num_workers: int = 0
    """Processes that read images."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit: expected at least 1, found {self.limit}.")
        if self.num_workers < 0:
            raise UserError(f"--num_workers: expected at least 0, found {self.num_workers}.")
        if self.zip and self.archive == self.out:
            raise UserError(f"--out: expected another ending beside --zip, found {self.out}.")

    @property
    def skips(self) -> bool:
        """Whether an unreadable image stops nothing."""
        return self.skip_bad or self.bad_label is not None

    @property
    def archive(self) -> Path:
        """The zip."""
        return self.out.with_suffix(".zip")

    @property
    def answers(self) -> Answers:
        """What a row holds where the format and the template leave it open."""
        return Answers(
            probabilities=self.probabilities, labels=self.labels, score_class=self.score_class
        )


def predict(options: Options) -> None:
    """Classify each image once and write the prediction file."""
    from robust_submission.data.sources import run_roots
    from robust_submission.models.cpu import optimize_for_cpu
    from robust_submission.models.load import load_checkpoint
    from robust_submission.prediction.writer import FREQUENT, label_unread, predict_images
    from robust_submission.runtime import start_accelerator

    read = checkpoint_files(options.checkpoint, options.trn)
    if options.images is None:
        read += run_roots(options.checkpoint)
    for path in (options.out, options.archive) if options.zip else (options.out,):
        check_writable(path, *read, options.images, options.template)
    format = choose_format(options.out, options.format)
    template = read_template(options.template, format) if options.template else None
    accelerator = start_accelerator(float64=True)
    source = _open_source(options)
    model = load_checkpoint(options.checkpoint, options.trn).to(accelerator.device)
    optimize_for_cpu(model, channels_last=accelerator.device.type == "cpu")
    if options.bad_label not in (None, FREQUENT):
        find_class(model.class_names, options.bad_label, "--bad_label")
    names = source.ids[: options.limit].tolist()
    left_out = source.ids[len(names) :].tolist()
    layout = plan_layout(format, names, model.class_names, template, options.answers, left_out)
    if accelerator.is_main_process:
        log.info("%s", layout.describe(model.class_names))
    loader = _loader(options, source, model.image_size, accelerator)
    predictions, skipped = predict_images(
        model, loader, accelerator, options.checkpoint, layout.needs_probabilities
    )
    if not predictions.images:
        place = options.images or options.checkpoint
        raise UserError(f"{place}: expected a readable image, found none.")
    if options.bad_label is not None:
        unread = source.ids[[*skipped]].tolist()
        predictions = label_unread(
            predictions, unread, options.bad_label, model.class_names, certain=layout.is_score
        )
    if accelerator.is_main_process:
        _write_outputs(options, predictions, layout)
        _name_skipped(options, [*skipped.values()])
    accelerator.end_training()


def _loader(
    options: Options, source: "Source", image_size: int, accelerator: "Accelerator"
) -> "EvaluationLoader":
    """The images of this process."""
    import numpy as np

    from robust_submission.data.dataset import ImageDataset
    from robust_submission.data.loader import EvaluationLoader

    indices = np.arange(len(source))[: options.limit]
    return EvaluationLoader(
        ImageDataset(source, indices, image_size, skip_bad=options.skips),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def _open_source(options: Options) -> "Source":
    from robust_submission.data.sources import open_run_data, open_source
    from robust_submission.data.truncated import TruncatedSource

    if options.images is None:
        source = open_run_data(options.checkpoint, "test", options.max_pixels)
    else:
        source = open_source("images", options.images, max_pixels=options.max_pixels)
    return source if options.bad_label is None else TruncatedSource(source)


def _write_outputs(options: Options, predictions: "Predictions", layout: Layout) -> None:
    from robust_submission.prediction.writer import write_predictions

    write_predictions(options.out, predictions, layout)
    print(f"{options.out}: {len(predictions.images)} rows")
    if options.zip:
        with atomic_write(options.archive) as temporary:
            write_archive(temporary, {options.out.name: options.out.read_bytes()})
        print(f"{options.archive}: {options.out.name}")


def _name_skipped(options: Options, messages: list[str]) -> None:
    filled = options.bad_label is not None
    for message in messages:
        log.warning("%s: %s", f"labelled {options.bad_label}" if filled else "skipped", message)
    if messages and not filled:
        log.warning("%d without a row; if each image needs one, give --bad_label", len(messages))


if __name__ == "__main__":
    run(predict, Options)
