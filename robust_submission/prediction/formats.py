"""The prediction file: three profiles, a template, the same bytes every time.

- `csv`: header `image_id,label`; image_id is the image's name.
- `json`: the challenge's Phase I, `[{"image_id": 7, "category_id": 0}, ...]`; image_id is the
  integer that the file's name is.
- `neurips`: `name,label` without a header (NeurIPS 2017 defence).

Labels are integers from 0, in the order of the class names. A template (the `sample_submission.csv`
of many contests) decides header, ids, row order, and whether labels are integers or class names.
Probabilities have six decimals, so that a row sums to 1 only up to rounding: in a CSV one column
`p_<class name>` a class, in JSON a list under "probabilities".
Text is UTF-8 without a byte order mark, lines end in LF, cells are quoted by RFC 4180 where needed.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write
from robust_submission.prediction.layout import LABEL, Layout, plan_layout

Format = Literal["csv", "json", "neurips"]
FORMATS: tuple[str, ...] = get_args(Format)
JSON_KEYS = ("image_id", "category_id", "probabilities")
DECIMALS = 6
CHUNK = 4096  # rows in memory as text at a time
_NEEDS_QUOTES = re.compile(r'[",\r\n]|^\s|\s$')


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the model said, one image a row."""

    ids: Sequence[str] | np.ndarray
    """Names of the images (N,)."""
    labels: np.ndarray
    """Classes, int64 (N,), from 0."""
    class_names: Sequence[str] | None = None
    """Names in label order (C,)."""
    probabilities: np.ndarray | None = None
    """float32 (N, C), 0 to 1."""

    def __post_init__(self) -> None:
        assert len(self.labels) == len(self.ids)
        if self.probabilities is not None:
            assert len(self.probabilities) == len(self.ids)
            assert self.class_names is None or len(self.class_names) == self.probabilities.shape[1]


def choose_format(path: Path, format: str | None = None) -> str:
    """The profile: `format` where given, else by the ending of `path`.

    Raises:
        UserError: no profile of that name, or an ending that names none.
    """
    choice = format or {".csv": "csv", ".json": "json"}.get(path.suffix.lower())
    if choice in FORMATS:
        return choice
    if format:
        raise UserError(f"--format: expected one of {', '.join(FORMATS)}, found {format}.")
    found = path.suffix or "no ending"
    raise UserError(f"{path}: expected the ending .csv or .json, or --format, found {found}.")


def _quote(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if _NEEDS_QUOTES.search(cell) else cell


def _decimal(probability: float) -> str:
    return f"{probability:.{DECIMALS}f}"


def _check_values(predictions: Predictions, class_names: Sequence[str]) -> None:
    labels, probabilities = predictions.labels, predictions.probabilities
    if wrong := np.flatnonzero((labels < 0) | (labels >= len(class_names))).tolist():
        found = f"{labels[wrong[0]]} for {predictions.ids[wrong[0]]!s}"
        raise UserError(f"expected labels from 0 to {len(class_names) - 1}, found {found}.")
    if probabilities is not None:
        sound = np.isfinite(probabilities) & (probabilities > -1e-5) & (probabilities < 1 + 1e-5)
        if wrong := np.flatnonzero(~sound.all(axis=1)).tolist():
            found = f"{probabilities[wrong[0]].tolist()} for {predictions.ids[wrong[0]]!s}"
            raise UserError(f"expected probabilities from 0 to 1, found {found}.")


def _chunks(layout: Layout, predictions: Predictions) -> Iterator[list[list[str]]]:
    """The cells after the ids, column by column, in the file's order."""
    texts = [_quote(name) for name in layout.label_names or []]
    order = np.asarray(layout.order, dtype=np.int64)
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        labels = predictions.labels[rows].tolist()
        cells = dict[int, list[str]]()
        cells[LABEL] = [texts[label] if texts else str(label) for label in labels]
        if predictions.probabilities is not None:
            shares = np.abs(predictions.probabilities[rows].clip(0, 1))  # abs: no "-0.000000"
            cells |= {
                label: [*map(_decimal, column.tolist())] for label, column in enumerate(shares.T)
            }
        yield [cells[column] for column in layout.columns]


def _csv_lines(layout: Layout, predictions: Predictions) -> Iterator[str]:
    if layout.header:
        yield ",".join(map(_quote, layout.header)) + "\n"
    ids = iter([_quote(str(name)) for name in layout.ids])
    for columns in _chunks(layout, predictions):
        for cells in zip(*columns, strict=True):
            yield f"{next(ids)},{','.join(cells)}\n"


def _json_lines(layout: Layout, predictions: Predictions) -> Iterator[str]:
    image_id, category_id, shares = JSON_KEYS
    ids, opening = iter(layout.ids), "[\n"
    for columns in _chunks(layout, predictions):
        for label, *cells in zip(*columns, strict=True):
            listed = f', "{shares}": [{", ".join(cells)}]' if cells else ""
            yield f'{opening}{{"{image_id}": {next(ids)}, "{category_id}": {label}{listed}}}'
            opening = ",\n"
    yield "\n]\n"


def write_predictions(
    path: Path,
    predictions: Predictions,
    format: str | None = None,
    template: Path | None = None,
    skipped: Collection[str] = (),
) -> None:
    """Write a prediction file, whole or not at all; the same predictions give the same bytes.

    Raises:
        UserError: see `choose_format`, `plan_layout` and `cli.files.atomic_write`; labels or
            probabilities out of range; a template that wants probabilities where there are none.
    """
    shares = predictions.probabilities
    count = shares.shape[1] if shares is not None else int(max(predictions.labels, default=0)) + 1
    class_names = predictions.class_names or [str(label) for label in range(count)]
    choice = choose_format(path, format)
    with_shares = shares is not None
    ids = [str(name) for name in predictions.ids]
    layout = plan_layout(choice, ids, class_names, template, with_shares, skipped)
    if layout.needs_probabilities and not with_shares:
        raise UserError(f"{template}: wants probability columns; give --probabilities.")
    _check_values(predictions, class_names)
    lines: Callable[[Layout, Predictions], Iterator[str]]
    lines = _json_lines if choice == "json" else _csv_lines
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines(layout, predictions))
