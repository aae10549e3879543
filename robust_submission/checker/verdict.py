"""A verdict: what was expected, what was found, and how to fix it."""

from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["pass", "fail", "note"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One line of the table."""

    check: str
    status: Status
    expected: str
    found: str
    fix: str = ""


def decide(check: str, good: bool, expected: str, found: str, fix: str) -> Verdict:
    """Pass or fail; a pass needs no fix."""
    return Verdict(
        check=check,
        status="pass" if good else "fail",
        expected=expected,
        found=found,
        fix="" if good else fix,
    )


def fail(check: str, expected: str, found: str, fix: str) -> Verdict:
    """A check that failed."""
    return decide(check, False, expected, found, fix)


def error_words(value: Any) -> str | None:
    """The words of a probe's error; None where it went well."""
    if not isinstance(value, dict) or "error" not in value:
        return None
    error = value["error"]
    place = f" ({error['place']})" if error["place"] else ""
    return f"{error['kind']}: {error['message']}{place}"
