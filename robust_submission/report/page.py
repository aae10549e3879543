"""The report as one HTML page that needs nothing else: no network, no script, no font."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from robust_submission.evaluation import wording
from robust_submission.evaluation.schema import Attacker, Curve, Measurement, Report, Share
from robust_submission.report.gallery import Row
from robust_submission.report.plots import curve_svgs

CURVES = {
    "epsilon": ("Accuracy against epsilon", "It should fall to about 0 as epsilon grows."),
    "steps": ("Accuracy against steps", "It should be flat at its end: more steps change little."),
}


def measurement_groups(report: Report) -> list[list[Measurement]]:
    """Measurements of equal attack, norm and epsilon together: oblivious, adaptive, transfer."""
    groups: dict[tuple[str, str, float], list[Measurement]] = {}
    for one in report.measurements:
        groups.setdefault((one.attack, one.norm, one.epsilon), []).append(one)
    order = list(Attacker)
    return [sorted(group, key=lambda one: order.index(one.attacker)) for group in groups.values()]


def curve_figures(report: Report) -> list[dict[str, Any]]:
    """One entry a drawing: its title, what to look for, the SVG and the curves behind it."""
    figures = []
    for name, (heading, hint) in CURVES.items():
        for norm, svg in curve_svgs(report, name).items():
            curves = [one for one in report.curves if (one.name, one.norm) == (name, norm)]
            images = curves[0].accuracy[0].total
            title = f"{heading}, {wording.NORMS.get(norm, norm)}, {wording.plural(images, 'image')}"
            figures.append(
                {"title": title, "hint": hint, "svg": Markup(svg), "curves": curves, "name": name}
            )
    return figures


def curve_points(curve: Curve) -> list[tuple[str, Share]]:
    """The points of a curve for reading: epsilon as in the table, steps as they are."""
    norm = curve.norm if curve.name == "epsilon" else ""
    names = [wording.radius(x, norm) if norm else wording.number(x) for x in curve.x]
    return list(zip(names, curve.accuracy, strict=True))


def exceeds(measurement: Measurement) -> bool:
    """Whether a perturbation left its ball by more than rounding."""
    return measurement.largest_perturbation > measurement.epsilon * (1 + 1e-4) + 1e-6


def levels(report: Report) -> list[dict[str, Any]]:
    """The rows of the scale from 0 to 100 % under the two numbers."""
    rows = [("clean", "clean images", report.clean)]
    if report.twin_clean:
        rows.append(("twin", "clean, undefended twin", report.twin_clean))
    rows.append(("oblivious", "what the leaderboard sees", report.oblivious))
    rows.append(("adaptive", "what is true", report.adaptive))
    return [{"kind": kind, "name": name, "share": share} for kind, name, share in rows]


def render_page(report: Report, rows: Sequence[Row], factor: int) -> str:
    """The page as text.

    Args:
        report: What evaluate.py found.
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
    environment.globals["wording"] = wording
    return environment.get_template("report.html").render(
        report=report,
        rows=rows,
        factor=factor,
        groups=measurement_groups(report),
        figures=curve_figures(report),
        levels=levels(report),
        curve_points=curve_points,
        exceeds=exceeds,
        checks=wording.checks_by_weight(report),
        num_classes=report.model.get("num_classes"),
    )
