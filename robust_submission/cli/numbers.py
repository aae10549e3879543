"""Numbers as reports and messages print them: percent, counts, radii, chance."""

import math

SPACE = "\N{NO-BREAK SPACE}"
UNKNOWN = "not known"
NORM_SYMBOLS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
_EXACT = 1e-3  # of 1/255: the rounding error of a level in float32


def percent(value: float) -> str:
    """Format a share from 0 to 1 as `94.0 %`."""
    return f"{100 * value:.1f}{SPACE}%" if math.isfinite(value) else UNKNOWN


def number(value: float) -> str:
    """Format a number in a few digits: `1,600`, `0.5`, `470.5`."""
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "unbounded" if value > 0 else UNKNOWN
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.1f}"


def plural(count: float, noun: str) -> str:
    """Format a count with its noun: `1 image`, `1,000 images`."""
    return f"{number(count)} {noun}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """Format a time in two digits, rounded up: `40 s`, `25 min`, `3.4 h`."""
    unit, size = next(
        (unit, size)
        for unit, size, least in (("h", 3600, 5400), ("min", 60, 90), ("s", 1, 0))
        if seconds >= least
    )
    value = seconds / size
    shown = math.ceil(value) if unit != "h" or value >= 10 else math.ceil(10 * value) / 10
    return f"{number(shown)}{SPACE}{unit}"


def chance(num_classes: int) -> str:
    """Format how often a guess is correct: `10 %`, `0.1 %`, `0.00458 %`."""
    return f"{100 / num_classes:.3g}{SPACE}%"


def distance(value: float, norm: str) -> str:
    """Format a measured distance in three digits: `3.41/255` in L-infinity, else `0.213`."""
    if not math.isfinite(value):
        return number(value)
    return f"{255 * value:.3g}/255" if norm == "linf" else number(float(f"{value:.3g}"))


def radius(value: float, norm: str) -> str:
    """Format an epsilon or a distance: `8/255` where that is exact, else a plain number.

    In L2 and L1 a short decimal comes first: 0.2 and 8 are what the user wrote, not 51/255 and
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
