"""Columns that other tools add to a prediction file, and that no grader expects."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

_INDEX_NAMES = ("", "Unnamed: 0")
_Rows = Iterable[tuple[int, list[str]]]  # lines and cells


class ForeignColumn(NamedTuple):
    """A column that does not belong there."""

    place: int
    name: str
    kind: str
    """What it is: an index column, an empty last column, an extra column."""
    fix: str


def foreign_columns(
    header: Sequence[str], is_known: Callable[[str], bool]
) -> Iterator[ForeignColumn]:
    """The columns that do not belong into a file; a first one of another name is for the ids."""
    last = len(header) - 1
    for place, name in enumerate(header):
        if place == 0 and name in _INDEX_NAMES and last > 1 and is_known(header[1]):
            yield ForeignColumn(place, name, "index column", "write it with to_csv(index=False)")
        elif place == last > 1 and not name:
            fix = "delete the delimiter at the end of each line"
            yield ForeignColumn(place, name, "empty last column", fix)
        elif place > 0 and not is_known(name):
            yield ForeignColumn(place, name, "extra column", "delete the column")


def is_needless(column: ForeignColumn, cells: Sequence[str]) -> bool:
    """Whether the cells show that the column can be left out.

    An index counts from 0. Kaggle's column Usage says which leaderboard counts a row.
    """
    if column.kind == "index column":
        return all(cell == str(place) for place, cell in enumerate(cells))
    if column.kind == "empty last column":
        return not any(cells)
    return {*cells} <= {"Public", "Private", "Ignored"}


def without_columns(rows: _Rows, foreign: Collection[ForeignColumn]) -> _Rows:
    """The rows without the cells of these columns."""
    places = {column.place for column in foreign}
    if not places:
        return rows
    return (
        (line, [cell for place, cell in enumerate(cells) if place not in places])
        for line, cells in rows
    )
