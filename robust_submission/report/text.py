"""Puts the report's numbers and verdict into words, for the page and the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from robust_submission.cli.numbers import (
    NORM_SYMBOLS,
    SPACE,
    UNKNOWN,
    number,
    percent,
    plural,
    radius,
)
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import Check, Curve, Measurement, Outcome, Share
from robust_submission.report.schema import Report

NO_IMAGES = "no images"
OUTCOMES: dict[Outcome, str] = {
    "failed": "attack failed",
    "masking": "sign of masking",
    "warning": "warning",
    "ok": "passed",
    "not run": "not run",
}
"""The outcomes of checks in words, the most serious first."""
_RADII = ("epsilon", "step_size")


def share_percent(share: Share) -> str:
    """`94.0 %`, or that there was no image to count."""
    return percent(share.value) if share.total else NO_IMAGES


def interval_percent(share: Share) -> str:
    """The 95 % interval as `92.1 to 95.4 %`."""
    if not share.total or not (math.isfinite(share.low) and math.isfinite(share.high)):
        return UNKNOWN
    return f"{100 * share.low:.1f} to {percent(share.high)}"


def counted(share: Share) -> str:
    """`470 of 500 images`; a mean over draws may be fractional."""
    count = round(share.count, 1) if math.isfinite(share.count) else share.count
    return f"{number(count)} of {plural(share.total, 'image')}" if share.total else NO_IMAGES


def robustness_percent(share: Share) -> str:
    """AR as `AR 98.9 % of the images correct when clean`, or that there was none."""
    if not share.total:
        return f"AR {UNKNOWN}: no image was correct when clean"
    return f"AR {percent(share.value)} of the images correct when clean"


def draws_percent(share: Share) -> str:
    """The values by draw of a random model in percent; their range if there are many."""
    values = share.by_draw
    if not values:
        return ""
    if len(values) > 10:
        return f"{len(values)} draws from {100 * min(values):.1f} to {percent(max(values))}"
    listed = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{plural(len(values), 'draw')}: {listed}{SPACE}%"


def words(value: Any, norm: str = "") -> str:
    """Any plain value of the report, for a reader: mappings and lists in one line.

    With a norm, a plain number is a radius in it, and so are a mapping's epsilon and step size.
    """
    if isinstance(value, Mapping):
        norms = {key: norm if key in _RADII else "" for key in value}
        return ", ".join(f"{title(key)} {words(value[key], norms[key])}" for key in value)
    if isinstance(value, (list, tuple, set)):
        return ", ".join(words(item, norm) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return radius(value, norm) if norm == "linf" and 0 < value < 1 else number(value)
    return str(value)


def title(key: object) -> str:
    """A key of the report as words: `step_size` is `step size`."""
    return str(key).replace("_", " ")


def settings_words(measurement: Measurement) -> str:
    """The settings that the table's other columns do not show; short ones do not wrap."""
    rest = {key: item for key, item in measurement.settings.items() if key not in _IN_COLUMNS}
    listed = [words({key: item}, measurement.norm) for key, item in rest.items()]
    return ", ".join(one.replace(" ", SPACE) if len(one) < 30 else one for one in listed)


_IN_COLUMNS = {"norm", "epsilon"}


def points(difference: float) -> str:
    """A difference of two shares: `93.7 points`."""
    return f"{100 * difference:.1f} points" if math.isfinite(difference) else UNKNOWN


def checks_by_weight(report: Report) -> list[Check]:
    """Signs of masking first, then warnings, then what passed or was not run."""
    return [check for outcome in OUTCOMES for check in report.checks_with(outcome)]


def headline(report: Report) -> str:
    """The verdict as a heading."""
    return {
        "masked": "The gradients are masked.",
        "no sign of masking": "No sign of masking.",
        "evaluation failed": "The evaluation failed.",
        "screened only": "Screened only; run --attacks autoattack.",
    }[report.verdict]


def bound(report: Report) -> str:
    """What the adaptive number is: the words before it."""
    return f"{UNKNOWN}; at most" if report.verdict == "evaluation failed" else "at most"


def at_most(report: Report) -> str:
    """The adaptive number as the upper bound that it is: `at most 77.0 %`."""
    return f"{bound(report)} {share_percent(report.adaptive)}"


def planted_words(report: Report) -> str:
    """How strong the adaptive attack is, by the examples planted for it; empty if unmeasured."""
    return f"Adaptive PGD finds {report.planted.words}." if report.planted else ""


def median_words(report: Report) -> str:
    """How near the adaptive attacker comes to half of the images; empty if unmeasured."""
    if report.median is None:
        return ""
    count = plural(report.median.total, "image")
    return f"Half of {count} fall {report.median.words}, those included that are wrong when clean."


def curve_attacks(curves: Sequence[Curve]) -> str:
    """Which attacks each curve is the worst case of: `pgd-20 (oblivious), fmn-50 and pgd-20
    (adaptive)`."""
    return ", ".join(f"{' and '.join(curve.attacks)} ({curve.attacker})" for curve in curves)


def reason(report: Report) -> str:
    """Why the verdict is what it is, in two or three sentences."""
    ran = len(report.checks) - len(report.checks_with("not run"))
    apart, overlap = points(report.gap), report.oblivious.low <= report.adaptive.high
    if report.verdict == "masked":
        signs = len(report.checks_with("masking"))
        first = f"{signs} of {plural(ran, 'check')} show{'s' * (signs == 1)} it."
        if overlap:
            return f"{first} {_accuracies(report)} They lie {apart} apart, within their intervals."
        return f"{first} {_accuracies(report)} The {apart} between them are not robustness."
    if report.verdict == "evaluation failed":
        signs = plural(len(report.checks_with("failed")), "check")
        return (
            f"By {signs} of {ran} the adaptive attack was too weak for this model. "
            f"{_accuracies(report)} What the model is worth is not known."
        )
    if report.verdict == "screened only":
        signs = len(report.checks_with("warning")) + len(report.checks_with("failed"))
        return (
            f"{signs} of {plural(ran, 'check')} warn{'s' * (signs == 1)}, and only screen was run. "
            f"{_accuracies(report)} AutoAttack may leave less: run --attacks autoattack."
        )
    first = f"None of {plural(ran, 'check')} found one." if ran else "No check was run."
    agree = "within their intervals" if overlap else "more than their intervals allow"
    return (
        f"{first} {_accuracies(report)} They lie {apart} apart, {agree}. "
        "Checks can find masking; they cannot prove that there is none."
    )


def _accuracies(report: Report) -> str:
    oblivious, adaptive = share_percent(report.oblivious), share_percent(report.adaptive)
    return f"Robust accuracy is {oblivious} (oblivious) and at most {adaptive} (adaptive)."


def random_shares(report: Report) -> list[tuple[str, Share]]:
    """The other adaptive numbers of a random model: an attacker who may retry, or fixes it."""
    if not report.model.get("random"):
        return []
    shares = {
        "right in every draw": report.adaptive_worst_draw,
        "randomness fixed, PGD": report.adaptive_fixed,
    }
    return [(name, share) for name, share in shares.items() if share is not None]


def print_table(report: Report, console: Console | None = None) -> None:
    """Print the verdict, the headline numbers and every measurement, by attacker."""
    console = console or Console()
    style = "bold" if report.verdict == "no sign of masking" else "bold red"
    console.print(Text(f"Verdict: {report.verdict}", style))
    console.print(Text(reason(report)))
    numbers = Table.grid(padding=(0, 2))
    mean = report.corruptions.mean if report.corruptions else None
    for name, shown, share in (
        ("Robust accuracy (oblivious)", share_percent(report.oblivious), report.oblivious),
        ("Robust accuracy (adaptive)", at_most(report), report.adaptive),
        *((f"  {name}", share_percent(share), share) for name, share in random_shares(report)),
        ("Clean accuracy", share_percent(report.clean), report.clean),
        *([("Corrupted accuracy (mean)", share_percent(mean), mean)] if mean else []),
    ):
        value = Text(shown, "bold", justify="right")
        numbers.add_row(name, value, interval_percent(share), counted(share))
    for name, area in (("Clean", report.auc), ("Corrupted", report.corrupted_auc)):
        if area is not None:
            numbers.add_row(f"{name} ROC AUC", Text(f"{area:.4f}", "bold", justify="right"))
    if report.median:
        half, of = Text(report.median.words, "bold", justify="right"), report.median.total
        row = half, report.median.interval, f"half of {plural(of, 'image')}"
        numbers.add_row("Half of the images fall", *row)
    console.print(numbers)
    if report.planted:
        console.print(Text(planted_words(report)))
    if report.measurements:
        console.print(_measurement_table(report))
    for outcome in ("failed", "masking", "warning"):
        for check in report.checks_with(outcome):
            console.print(Text(f"{OUTCOMES[outcome]}: {check.question} {check.found}"))


def _measurement_table(report: Report) -> Table:
    table = Table(caption="robust accuracy with its 95 % interval", caption_justify="left")
    table.add_column("attack", overflow="fold")
    for attacker in report.attackers:
        table.add_column(attacker, justify="right")
    for group in report.groups:
        first = group[0]
        norm, epsilon = NORM_SYMBOLS.get(first.norm, first.norm), radius(first.epsilon, first.norm)
        cells = (_cell(group, attacker) for attacker in report.attackers)
        table.add_row(Text(f"{first.attack} {norm} {epsilon}"), *cells)
    return table


def _cell(group: Sequence[Measurement], attacker: Attacker) -> Text:
    shares = [one.robust_accuracy for one in group if one.attacker == attacker]
    return Text("\n".join(f"{share_percent(s)}\n{interval_percent(s)}" for s in shares))
