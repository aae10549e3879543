"""The report's gallery: clean, attacked and amplified difference, with what the model said."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from robust_submission.cli.errors import UserError
from robust_submission.evaluation.schema import Picture, Report
from robust_submission.report.plots import INK, STYLE, write_png

Pictures = Mapping[str, Sequence[np.ndarray]]
"""By "clean", "oblivious" and "adaptive": uint8 (H, W, 3) RGB, parallel to the report's gallery."""
TIMES = "\N{MULTIPLICATION SIGN}"
SMALL = 128  # pixels: below this a picture is enlarged with its pixels showing


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One picture of the gallery; `prediction` is empty under a difference."""

    column: str
    image: np.ndarray
    prediction: str
    right: bool

    @property
    def uri(self) -> str:
        """The picture as a PNG in a data URI."""
        encoded = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.image)).save(encoded, format="PNG")
        return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()

    @property
    def small(self) -> bool:
        """Whether its pixels should show."""
        return max(self.image.shape[:2]) < SMALL


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of the gallery, from clean to attacked."""

    picture: Picture
    tiles: tuple[Tile, ...]


def difference_factor(pictures: Pictures) -> int:
    """The whole factor, one for all, that makes the gallery's largest change fill the range."""
    changes = [
        int(np.abs(attacked.astype(int) - clean).max())
        for kind in ("oblivious", "adaptive")
        for clean, attacked in zip(pictures["clean"], pictures[kind], strict=True)
    ]
    return max(1, 127 // max(1, *changes))


def difference(clean: np.ndarray, attacked: np.ndarray, factor: int) -> np.ndarray:
    """What the attack changed, times `factor`, around mid-grey: uint8 (H, W, 3)."""
    change = attacked.astype(int) - clean
    return np.clip(128 + factor * change, 0, 255).astype(np.uint8)


def gallery_rows(report: Report, pictures: Pictures) -> tuple[list[Row], int]:
    """The rows of the gallery and the factor of its differences.

    Raises:
        UserError: the pictures are not parallel to `report.gallery`.
    """
    counts = {kind: len(pictures.get(kind, ())) for kind in ("clean", "oblivious", "adaptive")}
    if set(counts.values()) != {len(report.gallery)}:
        expected = len(report.gallery)
        raise UserError(f"gallery: expected {expected} pictures of each kind, found {counts}.")
    if not report.gallery:
        return [], 1
    factor = difference_factor(pictures)
    parallel = zip(
        report.gallery, pictures["clean"], pictures["oblivious"], pictures["adaptive"], strict=True
    )
    rows = [
        Row(picture=picture, tiles=_tiles(picture, clean, oblivious, adaptive, factor))
        for picture, clean, oblivious, adaptive in parallel
    ]
    return rows, factor


def _tiles(
    picture: Picture, clean: np.ndarray, oblivious: np.ndarray, adaptive: np.ndarray, factor: int
) -> tuple[Tile, ...]:
    def said(column: str, image: np.ndarray, prediction: str) -> Tile:
        right = prediction == picture.label
        return Tile(column=column, image=image, prediction=prediction, right=right)

    def changed(attacked: np.ndarray) -> Tile:
        image = difference(clean, attacked, factor)
        return Tile(column=f"difference {TIMES} {factor}", image=image, prediction="", right=False)

    return (
        said("clean", clean, picture.clean_prediction),
        said("oblivious attack", oblivious, picture.oblivious_prediction),
        changed(oblivious),
        said("adaptive attack", adaptive, picture.adaptive_prediction),
        changed(adaptive),
    )


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def _caption(tile: Tile) -> str:
    return ("✓ " if tile.right else "✗ ") + _short(tile.prediction) if tile.prediction else ""


def write_gallery(rows: Sequence[Row], path: Path) -> None:
    """Write the gallery as a PNG; without rows, no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    columns = [tile.column for tile in rows[0].tiles]
    with mpl.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(1.6 * len(columns), 1.85 * len(rows) + 0.3), layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for axes_row, row in zip(grid, rows, strict=True):
            for axes, tile in zip(axes_row, row.tiles, strict=True):
                axes.imshow(tile.image, interpolation="nearest" if tile.small else "antialiased")
                axes.set(xticks=[], yticks=[])
                axes.set_xlabel(_caption(tile), color=INK, parse_math=False)
            axes_row[0].set_ylabel(_short(row.picture.label), fontweight="bold", parse_math=False)
        for axes, heading in zip(grid[0], columns, strict=True):
            axes.set_title(heading, fontsize=8.5, fontweight="bold")
        write_png(figure, path, 130)
