"""Writes the robustness report: JSON, CSV, plots, gallery and one HTML page.

    write_report(report, pictures, per_image, Path("report"))

Equal input gives equal bytes in every file. The page needs no network, script or font.
docs/report.md explains the files to their readers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from robust_submission.cli import numbers
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write
from robust_submission.cli.numbers import NORM_SYMBOLS, number, plural, radius
from robust_submission.data.corruptions import FAMILIES
from robust_submission.evaluation.results import Curve, KindAccuracy, Measurement, Share
from robust_submission.report import text
from robust_submission.report.curves import curve_svgs, write_curves
from robust_submission.report.gallery import GalleryRow, Pictures, gallery_rows, write_gallery
from robust_submission.report.schema import Report, json_text

CURVES = {
    "epsilon": ("Accuracy against epsilon", "It should fall to about 0 as epsilon grows."),
    "steps": ("Accuracy against steps", "It should be flat at the end: more steps change little."),
}

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_report(report: Report, pictures: Pictures, per_image: pd.DataFrame, folder: Path) -> None:
    """Write every file of the report into `folder`, which is made if it is missing.

    If the report has no such curve or no gallery, epsilon.png, steps.png and gallery.png are not
    written, and removed if they are there.

    Args:
        report: The report.
        pictures: Under "clean", "oblivious" and "adaptive" uint8 arrays (H, W, 3), RGB, parallel
            to `report.gallery`.
        per_image: One row per image.
        folder: Where the files go.

    Raises:
        UserError: a file cannot be written.
    """
    rows, factor = gallery_rows(report, pictures)
    page = render_page(report, rows, factor)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: expected a folder, found: {error.strerror}.") from error
    _write_text(folder / "report.json", json_text(report))
    _write_text(
        folder / "per_image.csv",
        spreadsheet_text(per_image).to_csv(index=False, lineterminator="\n"),
    )
    write_curves(report, "epsilon", folder / "epsilon.png")
    write_curves(report, "steps", folder / "steps.png")
    write_gallery(rows, folder / "gallery.png")
    _write_text(folder / "report.html", page)


def spreadsheet_text(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `'` before each text that a spreadsheet would take for a formula.

    File names and class names may begin with =, +, - or @, and be a stranger's.
    """
    table = table.copy()
    for name, column in table.select_dtypes(exclude=["number", "bool"]).items():
        cells = [f"'{cell}" if str(cell).startswith(_FORMULA) else cell for cell in column]
        table[name] = cells
    return table


def _write_text(path: Path, content: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")


def render_page(report: Report, rows: Sequence[GalleryRow], factor: int) -> str:
    """Render the page.

    Args:
        report: The report.
        rows: The gallery; may be empty.
        factor: What its differences are multiplied by.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"text": text, "numbers": numbers}
    return environment.get_template("report.html").render(
        report=report,
        rows=rows,
        factor=factor,
        figures=_curve_figures(report),
        levels=_levels(report),
        families=_families(report),
        curve_points=_curve_points,
        exceeds=_exceeds,
        checks=text.checks_by_weight(report),
        num_classes=report.model.get("num_classes"),
    )


def _curve_figures(report: Report) -> list[dict[str, Any]]:
    """One entry per drawing: its title, what to look for, the SVG and the curves behind it."""
    figures = []
    for name, (heading, hint) in CURVES.items():
        for norm, svg in curve_svgs(report, name).items():
            curves = [one for one in report.curves if (one.name, one.norm) == (name, norm)]
            images = plural(curves[0].accuracy[0].total, "image")
            title = f"{heading}, {NORM_SYMBOLS.get(norm, norm)}, {images}"
            figures.append(
                {"title": title, "hint": hint, "svg": Markup(svg), "curves": curves, "name": name}
            )
    return figures


def _families(report: Report) -> dict[str, list[KindAccuracy]]:
    """The accuracies on corrupted images by family of corruptions."""
    kinds = report.corruptions.kinds if report.corruptions else ()
    named = {
        family: [kind for kind in kinds if kind.kind in FAMILIES[family]] for family in FAMILIES
    }
    return {family: kinds for family, kinds in named.items() if kinds}


def _curve_points(curve: Curve) -> list[tuple[str, Share]]:
    """The points of a curve for reading: epsilon as in the table, steps as they are."""
    norm = curve.norm if curve.name == "epsilon" else ""
    names = [radius(x, norm) if norm else number(x) for x in curve.x]
    return list(zip(names, curve.accuracy, strict=True))


def _exceeds(measurement: Measurement) -> bool:
    """Whether a perturbation left its ball by more than rounding."""
    return measurement.largest_perturbation > measurement.epsilon * (1 + 1e-4) + 1e-6


def _levels(report: Report) -> list[dict[str, Any]]:
    """The rows of the scale from 0 to 100 % under the headline numbers."""
    rows = [("clean", "clean", report.clean)]
    if report.twin_clean:
        rows.append(("twin", "clean, undefended twin", report.twin_clean))
    if report.corruptions:
        rows.append(("corrupted", "corrupted, mean", report.corruptions.mean))
    rows.append(("oblivious", "oblivious", report.oblivious))
    rows.append(("adaptive", "adaptive", report.adaptive))
    return [{"kind": kind, "name": name, "share": share} for kind, name, share in rows]
