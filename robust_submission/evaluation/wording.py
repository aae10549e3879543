"""Numbers and verdicts of the robustness report in words, for the page and the terminal."""

import math
from collections.abc import Mapping
from typing import Any

from robust_submission.evaluation.schema import Attacker, Check, Measurement, Report, Share

SPACE = "\N{NO-BREAK SPACE}"
UNKNOWN = "not known"
NO_IMAGES = "no images"
NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
OUTCOMES = {
    "ok": "passed",
    "masking": "sign of masking",
    "warning": "warning",
    "not run": "not run",
}
_RADII = ("epsilon", "step_size")
_EXACT = 1e-3  # of 1/255: what float32 rounding leaves of an exact level


def percent(value: float) -> str:
    """A share from 0 to 1 as `94.0 %`."""
    return f"{100 * value:.1f}{SPACE}%" if math.isfinite(value) else UNKNOWN


def share_percent(share: Share) -> str:
    """`94.0 %`, or that there was no image to count."""
    return percent(share.value) if share.total else NO_IMAGES


def interval(share: Share) -> str:
    """The 95 % interval as `92.1 to 95.4 %`."""
    if not share.total or not (math.isfinite(share.low) and math.isfinite(share.high)):
        return UNKNOWN
    return f"{100 * share.low:.1f} to {percent(share.high)}"


def number(value: float) -> str:
    """A number in a few digits: `1,600`, `0.5`, `470.5`."""
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "unbounded" if value > 0 else UNKNOWN
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.1f}"


def plural(count: float, noun: str) -> str:
    """`1 image`, `1,000 images`."""
    return f"{number(count)} {noun}{'s' * (count != 1)}"


def counted(share: Share) -> str:
    """`470 of 500 images`; a mean over draws may be broken."""
    count = round(share.count, 1) if math.isfinite(share.count) else share.count
    return f"{number(count)} of {plural(share.total, 'image')}" if share.total else NO_IMAGES


def attack_robustness(share: Share) -> str:
    """AR as `AR 98.9 % of those right when clean`, or that there was none."""
    found = f"{percent(share.value)} of those right when clean"
    return f"AR {found if share.total else f'{UNKNOWN}: none was right when clean'}"


def chance(num_classes: int) -> str:
    """How often a guess is right: `10 %`, `0.1 %`, `0.00458 %`."""
    return f"{100 / num_classes:.3g}{SPACE}%"


def radius(value: float, norm: str) -> str:
    """An epsilon or a distance in its norm: `8/255` where that is exact, else a plain number.

    In L2 and L1 a short decimal comes first: 0.2 and 8 are what was asked for, not 51/255 and
    2040/255.
    """
    if not math.isfinite(value):
        return number(value)
    short = math.isclose(value, round(value, 3), rel_tol=1e-5, abs_tol=1e-7)
    levels = value * 255
    exact = abs(levels - round(levels)) < _EXACT and 0 < round(levels) < 255
    if exact and (norm == "linf" or not short):
        return f"{round(levels)}/255"
    return number(round(value, 3) if short else value).replace(",", "")  # it names columns


def words(value: Any, norm: str = "") -> str:
    """Any plain value of the report, for a reader: mappings and lists in one line.

    In the norm are a plain number and, of a mapping, epsilon and step size.
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


def settings(measurement: Measurement) -> str:
    """The settings that the other columns do not show already; each breaks no line by itself."""
    shown = {"norm", "epsilon"}
    rest = {key: item for key, item in measurement.settings.items() if key not in shown}
    listed = [words({key: item}, measurement.norm) for key, item in rest.items()]
    return ", ".join(one.replace(" ", SPACE) if len(one) < 30 else one for one in listed)


def draws(share: Share) -> str:
    """The values by draw of a random model in percent; their range where they are many."""
    values = share.by_draw
    if not values:
        return ""
    if len(values) > 10:
        return f"{len(values)} draws from {100 * min(values):.1f} to {percent(max(values))}"
    listed = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{plural(len(values), 'draw')}: {listed}{SPACE}%"


def attackers(report: Report) -> list[Attacker]:
    """Who attacked, in the enum's order."""
    used = {one.attacker for one in report.measurements}
    return [attacker for attacker in Attacker if attacker in used]


def gap(report: Report) -> float:
    """How far the leaderboard number lies above the true one, from 0 to 1."""
    return report.oblivious.value - report.adaptive.value


def points(difference: float) -> str:
    """A difference of two shares: `93.7 points`."""
    return f"{100 * difference:.1f} points" if math.isfinite(difference) else UNKNOWN


def checks_with(report: Report, outcome: str) -> list[Check]:
    """The checks of one outcome, in the report's order."""
    return [check for check in report.checks if check.outcome == outcome]


def checks_by_weight(report: Report) -> list[Check]:
    """Signs of masking first, then warnings, then what passed or was not run."""
    order = ["masking", "warning", "ok", "not run"]
    return [check for outcome in order for check in checks_with(report, outcome)]


def headline(report: Report) -> str:
    """The verdict as a heading."""
    return {"masked": "The gradients are masked.", "no sign of masking": "No sign of masking."}[
        report.verdict
    ]


def reason(report: Report) -> str:
    """Why the verdict is what it is, in two or three sentences."""
    seen, true = share_percent(report.oblivious), share_percent(report.adaptive)
    apart = points(gap(report))
    overlap = report.oblivious.low <= report.adaptive.high
    ran = len(report.checks) - len(checks_with(report, "not run"))
    if report.verdict == "masked":
        signs = len(checks_with(report, "masking"))
        first = f"{signs} of {plural(ran, 'check')} show{'s' * (signs == 1)} it." if signs else ""
        if overlap:
            return f"{first} The two numbers lie {apart} apart, within their intervals.".lstrip()
        return (
            f"{first} Attacked as it stands, the model keeps {seen} of the images right; attacked "
            f"by someone who knows the defence, {true}. "
            f"The {apart} between them are not robustness."
        ).lstrip()
    first = f"None of the {ran} checks that ran found one." if ran else "No check was run."
    first = "The one check that ran found none." if ran == 1 else first
    agree = "within their intervals" if overlap else "more than their intervals allow"
    return (
        f"{first} The two numbers lie {apart} apart, {agree}. "
        "Checks can find masking; they cannot prove that there is none."
    )
