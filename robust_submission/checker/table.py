"""A verdict, and the table of them in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from robust_submission.cli.errors import printable

COLOURS = {"pass": "green", "fail": "bold red", "note": "yellow"}
WIDTH = 140
"""Columns of a file or a pipe."""


@dataclass(frozen=True, kw_only=True)
class RuleResult:
    """One check's line in the table."""

    check: str
    status: Literal["pass", "fail", "note"]
    expected: str
    found: str
    fix: str = ""


def print_verdicts(title: str, verdicts: Sequence[RuleResult]) -> None:
    """Print one line per check."""
    table = Table(title=Text(title, "bold"), title_justify="left")
    for column in ("check", "", "expected", "found", "how to fix it"):
        table.add_column(column, overflow="fold")
    for each in verdicts:
        status = Text(each.status, COLOURS[each.status])
        words = map(printable, (each.expected, each.found, each.fix))  # a stranger's, in part
        table.add_row(each.check, status, *map(Text, words))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)
