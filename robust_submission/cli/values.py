"""Values of options: types of our own, and a check for what jsonargparse lets pass."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any, get_args

from robust_submission.cli.errors import UserError, shorten


class Ratio(float):
    """A number, also written as a fraction: `8/255`, `0.03`."""

    def __new__(cls, value: str | float) -> "Ratio":
        try:
            above, slash, below = value.partition("/") if isinstance(value, str) else (value, "", 1)
            ratio = super().__new__(cls, int(above) / int(below) if slash else above)
        except (ValueError, TypeError, ArithmeticError):
            ratio = None
        if ratio is None or not isfinite(ratio):
            found = shorten(value)
            raise UserError(f"expected a number or a fraction such as 8/255, found {found}")
        return ratio


class Names(tuple[str, ...]):
    """A list of names separated by commas: `fgsm,pgd`."""

    def __new__(cls, value: str | Sequence[str] = ()) -> "Names":
        names = value.split(",") if isinstance(value, str) else value
        return super().__new__(cls, (name.strip() for name in names if name.strip()))


class Ratios(tuple[Ratio, ...]):
    """A list of ratios separated by commas: `4/255,8/255`."""

    def __new__(cls, value: str | float | Sequence[str | float] = ()) -> "Ratios":
        if isinstance(value, (str, float, int)):
            value = str(value).split(",")
        return super().__new__(cls, (Ratio(number) for number in value))


def check_values(options: type, values: Mapping[Any, Any], prefix: str = "") -> None:
    """Raise UserError for what jsonargparse lets pass: null where a value is needed, and `data: 5`
    where data is a group of keys."""
    for field in fields(options):
        if field.name not in values:
            continue
        name, value, kinds = prefix + field.name, values[field.name], get_args(field.type)
        kind, found = field.type, {name: value}
        if isinstance(value, list) and kinds:  # of groups, or of plain values
            kind, found = kinds[0], {f"{name}.{place}": each for place, each in enumerate(value)}
        for place, each in found.items():
            if isinstance(kind, type) and is_dataclass(kind):
                if not isinstance(each, Mapping):
                    raise UserError(f"{place}: expected a group of keys, found {shorten(each)}.")
                check_values(kind, each, f"{place}.")
            elif each is None and type(None) not in kinds:
                raise UserError(f"{place}: expected a value, found null.")
