"""Classifies every image once, and writes the prediction file: the same bytes every time.

Text is UTF-8 without a byte order mark, lines end in LF, cells are quoted by RFC 4180 where needed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write
from robust_submission.data.dataset import Skipped
from robust_submission.data.gather import gather_by_index, gather_skipped
from robust_submission.data.loader import EvaluationLoader, micro_batches
from robust_submission.models.classifier import RobustClassifier
from robust_submission.prediction.schema import JSON_KEYS, LABEL_COLUMN, Layout, find_class

FREQUENT = "frequent"
"""Stands for the class that is predicted most."""
_NEEDS_QUOTES = re.compile(r'[",\r\n]|^\s|\s$')


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the model predicted, one image per row."""

    images: Sequence[str]
    """Names of the images (N,)."""
    labels: np.ndarray
    """Classes, int64 (N,), from 0."""
    probabilities: np.ndarray | None = None
    """float32 (N, C), 0 to 1."""

    def __post_init__(self) -> None:
        assert len(self.labels) == len(self.images) and (self.labels >= 0).all()
        shares = self.probabilities
        if shares is not None:
            assert len(shares) == len(self.images)
            assert np.all((shares > -1e-5) & (shares < 1 + 1e-5)), "also that none is NaN"


def predict_images(
    model: RobustClassifier,
    loader: EvaluationLoader,
    accelerator: Accelerator,
    checkpoint: Path,
    probabilities: bool,
) -> tuple[Predictions, dict[int, str]]:
    """Classify the images of a loader, together with the other processes.

    Args:
        model: On the accelerator's device.
        loader: This process's images.
        accelerator: Every process must call this function.
        checkpoint: Where the model is from, for the error.
        probabilities: Whether to return them, the softmax of the logits in float64.

    Returns:
        The predictions of all processes, in the order of the images' indices; and one message for
        each image that could not be read, by index. The same in every process.

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
    return predictions, skipped


@torch.inference_mode()
def _classify(
    model: RobustClassifier,
    loader: EvaluationLoader,
    accelerator: Accelerator,
    checkpoint: Path,
    probabilities: bool,
) -> tuple[dict[str, torch.Tensor], list[Skipped]]:
    """This process's `index`, `label` and, if wanted, `probabilities`; and what it cannot read."""
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
                found = f"NaN or infinity for {name}"
                raise UserError(f"{checkpoint}: expected finite logits, found {found}.")
            columns["index"].append(indices)
            columns["label"].append(logits.argmax(1))
            if probabilities:
                columns["probabilities"].append(logits.double().softmax(1).float())
            skipped += batch["skipped"]
            bar.update(count + len(batch["skipped"]))
    return {name: torch.cat(parts) for name, parts in columns.items()}, skipped


def label_unread(
    predictions: Predictions,
    unread: Sequence[str],
    choice: str,
    class_names: Sequence[str],
    *,
    certain: bool = False,
) -> Predictions:
    """Add images that could not be read, with a label and equal probabilities.

    Args:
        unread: Their names.
        choice: A class by name or index, or `FREQUENT`.
        class_names: Names in label order (C,).
        certain: Give a class that is named the probability 1: a score shows no other label.

    Raises:
        UserError: no such class.
    """
    if choice == FREQUENT:
        label = int(np.bincount(predictions.labels).argmax())
    else:
        label = find_class(class_names, choice, "--bad_label")
    shares, count = predictions.probabilities, len(class_names)
    if shares is not None:
        row = np.full(count, 1 / count)
        if certain and choice != FREQUENT:
            row = np.eye(count)[label]
        shares = np.concatenate([shares, np.tile(row.astype(shares.dtype), (len(unread), 1))])
    return Predictions(
        images=[*predictions.images, *unread],
        labels=np.append(predictions.labels, np.full(len(unread), label)),
        probabilities=shares,
    )


def _quote(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if _NEEDS_QUOTES.search(cell) else cell


def _rows(predictions: Predictions, layout: Layout) -> Iterator[tuple[str | int, list[str]]]:
    """The id of each row and its other cells, quoted; images without a prediction have no row."""
    places = {name: place for place, name in enumerate(predictions.images)}
    labels, shares = predictions.labels.tolist(), predictions.probabilities
    if shares is not None:
        shares = np.abs(shares.clip(0, 1))  # abs: no "-0.000000"
    names = [_quote(name) for name in layout.label_names]
    for written, image in layout.ids.items():
        if (place := places.get(image)) is None:
            continue
        label = names[labels[place]] if names else str(labels[place])
        row = shares[place].tolist() if shares is not None else []
        cells = [
            label if column == LABEL_COLUMN else f"{row[column]:.{layout.digits}f}"
            for column in layout.columns
        ]
        yield written, cells


def _csv_lines(predictions: Predictions, layout: Layout) -> Iterator[str]:
    if layout.header:
        yield ",".join(map(_quote, layout.header)) + "\n"
    for written, cells in _rows(predictions, layout):
        yield f"{_quote(str(written))},{','.join(cells)}\n"


def _json_lines(predictions: Predictions, layout: Layout) -> Iterator[str]:
    image_id, category_id, probabilities = JSON_KEYS
    opening = "[\n"
    for written, (label, *cells) in _rows(predictions, layout):
        listed = f', "{probabilities}": [{", ".join(cells)}]' if cells else ""
        yield f'{opening}{{"{image_id}": {written}, "{category_id}": {label}{listed}}}'
        opening = ",\n"
    yield "\n]\n"


def write_predictions(path: Path, predictions: Predictions, layout: Layout) -> None:
    """Write a prediction file, whole or not at all.

    Rows of the layout whose image has no prediction are left out.

    Raises:
        UserError: see `cli.files.atomic_write`.
    """
    lines = _json_lines if layout.format == "json" else _csv_lines
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines(predictions, layout))
