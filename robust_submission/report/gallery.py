"""Draws the report's gallery: clean, attacked and amplified difference, with the predictions."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from robust_submission.report.schema import GalleryImage, Report
from robust_submission.report.style import INK, STYLE, write_png

Pictures = Mapping[str, Sequence[np.ndarray]]
"""Under "clean", "oblivious" and "adaptive": uint8 (H, W, 3) RGB, parallel to `Report.gallery`."""
TIMES = "\N{MULTIPLICATION SIGN}"
SMALL = 128  # pixels: a smaller picture is enlarged with sharp pixels


@dataclass(frozen=True, kw_only=True)
class GalleryTile:
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
        """Whether its pixels should stay sharp."""
        return max(self.image.shape[:2]) < SMALL


@dataclass(frozen=True, kw_only=True)
class GalleryRow:
    """One image of the gallery, from clean to attacked."""

    picture: GalleryImage
    tiles: tuple[GalleryTile, ...]


def difference_factor(pictures: Pictures) -> int:
    """The integer factor, one for all images, at which the largest change fills the range."""
    changes = [
        int(np.abs(attacked.astype(int) - clean).max())
        for kind in ("oblivious", "adaptive")
        for clean, attacked in zip(pictures["clean"], pictures[kind], strict=True)
    ]
    return max(1, 127 // max(1, *changes))


def difference(clean: np.ndarray, attacked: np.ndarray, factor: int) -> np.ndarray:
    """The perturbation times `factor`, around mid-grey: uint8 (H, W, 3)."""
    change = attacked.astype(int) - clean
    return np.clip(128 + factor * change, 0, 255).astype(np.uint8)


def gallery_rows(report: Report, pictures: Pictures) -> tuple[list[GalleryRow], int]:
    """The rows of the gallery and the factor of its differences."""
    counts = {len(pictures[kind]) for kind in ("clean", "oblivious", "adaptive")}
    assert counts == {len(report.gallery)}, counts
    if not report.gallery:
        return [], 1
    factor = difference_factor(pictures)
    parallel = zip(
        report.gallery, pictures["clean"], pictures["oblivious"], pictures["adaptive"], strict=True
    )
    rows = [
        GalleryRow(picture=picture, tiles=_tiles(picture, clean, oblivious, adaptive, factor))
        for picture, clean, oblivious, adaptive in parallel
    ]
    return rows, factor


def _tiles(
    picture: GalleryImage,
    clean: np.ndarray,
    oblivious: np.ndarray,
    adaptive: np.ndarray,
    factor: int,
) -> tuple[GalleryTile, ...]:
    def said(column: str, image: np.ndarray, prediction: str) -> GalleryTile:
        right = prediction == picture.label
        return GalleryTile(column=column, image=image, prediction=prediction, right=right)

    def changed(attacked: np.ndarray) -> GalleryTile:
        image, column = difference(clean, attacked, factor), f"difference {TIMES} {factor}"
        return GalleryTile(column=column, image=image, prediction="", right=False)

    return (
        said("clean", clean, picture.clean_prediction),
        said("oblivious attack", oblivious, picture.oblivious_prediction),
        changed(oblivious),
        said("adaptive attack", adaptive, picture.adaptive_prediction),
        changed(adaptive),
    )


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def _caption(tile: GalleryTile) -> str:
    return ("✓ " if tile.right else "✗ ") + _short(tile.prediction) if tile.prediction else ""


def write_gallery(rows: Sequence[GalleryRow], path: Path) -> None:
    """Write the gallery as a PNG; remove it if there are no rows."""
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
