"""Write the robustness report: JSON, CSV, plots, gallery and one HTML page; print its table.

    write_report(report, pictures, per_image, Path("report"))
    report = read_report(Path("report"))

Equal input gives equal bytes in every file. docs/report.md explains the files to their readers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write
from robust_submission.evaluation import wording
from robust_submission.evaluation.schema import Attacker, Measurement, Report
from robust_submission.report.gallery import Pictures, gallery_rows, write_gallery
from robust_submission.report.page import measurement_groups, render_page
from robust_submission.report.plots import write_curves


def write_report(report: Report, pictures: Pictures, per_image: pd.DataFrame, folder: Path) -> None:
    """Write every file of the report into `folder`, made where it is missing.

    epsilon.png, steps.png and gallery.png are left out, and removed where an earlier report left
    them, when the report has no such curve or no gallery.

    Args:
        report: What evaluate.py found.
        pictures: Under "clean", "oblivious" and "adaptive" uint8 arrays (H, W, 3), RGB, parallel
            to `report.gallery`.
        per_image: One row an image.
        folder: Where the files go.

    Raises:
        UserError: the pictures are not parallel to the gallery, or a file cannot be written.
    """
    rows, factor = gallery_rows(report, pictures)
    page = render_page(report, rows, factor)
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "report.json", json_text(report))
    _write_text(folder / "per_image.csv", per_image.to_csv(index=False, lineterminator="\n"))
    write_curves(report, "epsilon", folder / "epsilon.png")
    write_curves(report, "steps", folder / "steps.png")
    write_gallery(rows, folder / "gallery.png")
    _write_text(folder / "report.html", page)


def json_text(report: Report) -> str:
    """report.json: indented, UTF-8, null for what is not a finite number."""
    plain = to_jsonable_python(report, inf_nan_mode="null", fallback=_plain)
    return json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_report(folder: Path) -> Report:
    """The report that stands in `folder`.

    Raises:
        UserError: there is no report.json, as before an evaluation has finished; it is damaged or
            of another schema; or a number of it is not finite.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(f"{path}: expected the report of a finished evaluation, found none.")
    try:
        report = TypeAdapter(Report).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: expected a whole report, found: {f'{place}: ' * bool(place)}{first['msg']}."
        ) from error
    if report.schema != Report.schema:
        raise UserError(f"{path}: expected schema {Report.schema}, found {report.schema}.")
    return report


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def print_table(report: Report, console: Console | None = None) -> None:
    """Print the verdict, the two numbers and every measurement, oblivious beside adaptive."""
    console = console or Console()
    style = "bold red" if report.verdict == "masked" else "bold"
    console.print(Text(f"Verdict: {report.verdict}", style))
    console.print(Text(wording.reason(report)))
    numbers = Table.grid(padding=(0, 2))
    for name, value in (
        ("What the leaderboard sees (oblivious)", report.oblivious),
        ("What is true (adaptive)", report.adaptive),
        ("Clean", report.clean),
    ):
        percent = Text(wording.share_percent(value), "bold", justify="right")
        numbers.add_row(name, percent, wording.interval(value), wording.counted(value))
    console.print(numbers)
    if report.measurements:
        console.print(_measurements(report))
    for outcome in ("masking", "warning"):
        for check in wording.checks_with(report, outcome):
            console.print(Text(f"{wording.OUTCOMES[outcome]}: {check.question} {check.found}"))


def _measurements(report: Report) -> Table:
    attackers = wording.attackers(report)
    table = Table(caption="robust accuracy with its 95 % interval", caption_justify="left")
    table.add_column("attack", overflow="fold")
    for key in attackers:
        table.add_column(key, justify="right")
    for group in measurement_groups(report):
        table.add_row(Text(_attack(group[0])), *(_cells(group, key) for key in attackers))
    return table


def _attack(measurement: Measurement) -> str:
    norm = wording.NORMS.get(measurement.norm, measurement.norm)
    return f"{measurement.attack} {norm} {wording.radius(measurement.epsilon, measurement.norm)}"


def _cells(group: Sequence[Measurement], attacker: Attacker) -> Text:
    shares = [one.robust_accuracy for one in group if one.attacker == attacker]
    return Text("\n".join(f"{wording.share_percent(s)}\n{wording.interval(s)}" for s in shares))
