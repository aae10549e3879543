"""Draws the report's accuracy curves, as PNG and as SVG for the page.

Equal input gives equal bytes: ids come from a fixed salt. The oblivious curve is hollow and dashed,
the adaptive one solid, so that they differ not only in colour (Okabe and Ito's orange and blue,
darkened).
"""

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from robust_submission.cli.numbers import NORM_SYMBOLS
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import Curve
from robust_submission.report.schema import Report
from robust_submission.report.style import INK, LINE, MUTED, PAPER, STYLE, write_png


@dataclass(frozen=True, kw_only=True)
class _Look:
    color: str
    marker: str
    line: str
    hollow: bool


LOOKS: dict[Attacker, _Look] = {
    Attacker.OBLIVIOUS: _Look(color="#b34a00", marker="o", line="--", hollow=True),
    Attacker.ADAPTIVE: _Look(color="#005f9e", marker="s", line="-", hollow=False),
    Attacker.ADAPTIVE_BPDA: _Look(color="#005f9e", marker="D", line=":", hollow=False),
    Attacker.TRANSFER: _Look(color="#4b7a3a", marker="^", line="-.", hollow=True),
}
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    LOOKS[Attacker.OBLIVIOUS].color: "var(--oblivious)",
    LOOKS[Attacker.ADAPTIVE].color: "var(--adaptive)",
    LOOKS[Attacker.TRANSFER].color: "var(--transfer)",
}


def panels(report: Report, name: str) -> dict[str, list[Curve]]:
    """The curves with one name ("epsilon" or "steps") by norm, if they have a finite point."""
    found: dict[str, list[Curve]] = {}
    for curve in report.curves:
        if curve.name == name and any(np.isfinite([share.value for share in curve.accuracy])):
            found.setdefault(curve.norm, []).append(curve)
    return found


def _draw_curve(axes: Axes, curve: Curve) -> None:
    look = LOOKS[curve.attacker]
    rows = [(x, s.value, s.low, s.high) for x, s in zip(curve.x, curve.accuracy, strict=True)]
    x, value, low, high = np.array([row for row in rows if np.isfinite(row).all()]).T
    axes.fill_between(x, 100 * low, 100 * high, color=look.color, alpha=0.16, linewidth=0)
    axes.plot(
        x,
        100 * value,
        look.line,
        color=look.color,
        marker="" if curve.median else look.marker,
        markersize=5.5,
        markerfacecolor=PAPER if look.hollow else look.color,
        label=str(curve.attacker),
        clip_on=False,
        zorder=4 if look.hollow else 3,
    )


def _draw_levels(axes: Axes, report: Report) -> None:
    of_all = any(point.total != report.clean.total for point in report.curves[0].accuracy)
    label = f"clean, all {report.clean.total:,}" if of_all else "clean"
    axes.axhline(100 * report.clean.value, color=MUTED, linewidth=1, label=label, zorder=1)
    classes = report.model.get("num_classes")
    if classes:
        axes.axhline(100 / classes, color=MUTED, linewidth=1.2, linestyle=":", label="chance")


def _scale_x(axes: Axes, curves: list[Curve], unit: float | None) -> None:
    """Put ticks at the measured points, on a scale that keeps them apart.

    Of a fine curve at the ends, and where x is the unit times a power of two.
    """
    x = sorted({value for curve in curves for value in curve.x if math.isfinite(value)})
    positive = [value for value in x if value > 0]
    if positive and positive[-1] > 8 * positive[0]:
        if x[0] > 0:
            axes.set_xscale("log", base=2)
        else:
            axes.set_xscale("symlog", linthresh=positive[0], linscale=0.6, base=2)
    if x[0] < x[-1]:
        axes.set_xlim(x[0], x[-1])
    if unit is not None:
        octaves = [value for value in x[1:-1] if math.log2(value / unit).is_integer()]
        x = [x[0], *octaves, x[-1]]
    ticks = x[:: math.ceil(len(x) / 9)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_panel(axes: Axes, report: Report, curves: list[Curve]) -> None:
    name, norm = curves[0].name, curves[0].norm
    for curve in curves:
        _draw_curve(axes, curve)
    _draw_levels(axes, report)
    fine = name == "epsilon" and any(curve.median for curve in curves)
    _scale_x(axes, curves, report.measurements[0].epsilon if fine else None)
    if name == "steps":
        axes.set_xlabel(f"steps of the attack ({NORM_SYMBOLS.get(norm, norm)})")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        unit = ", in 1/255" if norm == "linf" else ""
        axes.set_xlabel(f"{NORM_SYMBOLS.get(norm, norm)} epsilon{unit}")
        scale = 255 if norm == "linf" else 1
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{scale * x:.4g}"))
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncol=3, columnspacing=1.2)


def write_curves(report: Report, name: str, path: Path) -> None:
    """Write the curves of `name` as a PNG, one panel per norm; remove it if there are none."""
    norms = panels(report, name)
    if not norms:
        path.unlink(missing_ok=True)
        return
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(norms), 4.2), layout="constrained")
        for axes, curves in zip(
            figure.subplots(1, len(norms), squeeze=False)[0], norms.values(), strict=True
        ):
            _draw_panel(axes, report, curves)
        write_png(figure, path, 200)


def curve_svgs(report: Report, name: str) -> dict[str, str]:
    """One inline SVG per norm, in the page's colours and fonts, without ids that could clash."""
    drawings = {}
    for norm, curves in panels(report, name).items():
        with mpl.rc_context({**STYLE, "svg.hashsalt": "report"}):
            figure = Figure(figsize=(4.9, 3.7), layout="constrained")
            _draw_panel(figure.subplots(), report, curves)
            text = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(text, format="svg", metadata=nothing, transparent=False)
        drawings[norm] = _for_page(text.getvalue(), f"{name}-{norm}")
    return drawings


def _for_page(svg: str, prefix: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg
    )
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
