"""A contest's sample_submission.csv, and what it shows of the file that is wanted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robust_submission.cli.errors import UserError, log
from robust_submission.prediction.foreign import foreign_columns, is_needless, without_columns
from robust_submission.prediction.reader import Fault, csv_rows, shorten
from robust_submission.prediction.schema import HEADER, LABEL_COLUMN, Format, Labels, column_order

_PLAIN_NUMBER = re.compile(r"[0-9]*\.?[0-9]*(e-?[0-9]+)?", re.IGNORECASE)
_LABEL_COLUMNS = ("label", "category", "category_id", "class", "class_id", "target", "prediction")
_SCORE_COLUMNS = ("score", "probability", "prob", "confidence")
_READ_ANYWAY = ("byte order mark", "blank line", "UTF-16", "delimiter")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A contest's sample_submission.csv: a sound CSV file whose first column is the ids."""

    path: Path
    header: list[str] | None
    rows: dict[str, list[str]]
    """The cells of each row, its id included, by id."""
    lines: dict[str, int]
    """The line of each row, by id."""

    @property
    def labels(self) -> set[str]:
        """What stands in the second column, empty cells apart."""
        return {cells[1] for cells in self.rows.values()} - {""}

    @property
    def wants_score(self) -> bool:
        """Whether its one column beside the ids is a probability: a fraction, or called so."""
        numbers = all(map(_PLAIN_NUMBER.fullmatch, self.labels))
        if self.header is None or len(self.header) > 2 or not numbers:
            return False
        return self.header[1].lower() in _SCORE_COLUMNS or "." in "".join(self.labels)

    def error(self, line: int | str, expected: str, found: str) -> UserError:
        """A fault of a line, to be raised."""
        return UserError(f"{self.path}: line {line}: expected {expected}, found {found}.")


def read_template(path: Path, format: Format) -> Template:
    """Read a template: CSV, with a header unless the format is `neurips`.

    A byte order mark and blank lines are ignored. UTF-16, another delimiter than the comma, and
    columns that no contest wants (an index, an empty last one, Kaggle's Usage) are too, with a
    message.

    Raises:
        UserError: unreadable, no CSV, no rows, an empty id, an id twice, a row of another length.
    """

    def report(fault: Fault) -> None:
        if fault.kind not in _READ_ANYWAY:
            raise UserError(f"{path}: {fault}")
        if fault.kind in ("UTF-16", "delimiter"):
            log.info("%s: found %s; read as such", path, fault.found)

    if path.suffix.lower() == ".json":
        raise UserError(f"{path}: expected a CSV file as the template, found JSON.")
    rows = list(csv_rows(path, report))
    if format != "neurips":
        rows = _without_needless(path, rows)
    header = None if format == "neurips" else next(iter(rows), (1, []))[1]
    template = Template(path=path, header=header, rows={}, lines={})
    width = len(header or ())
    for line, cells in rows if header is None else rows[1:]:
        width, name = width or len(cells), cells[0]
        if len(cells) != width or not name:
            raise template.error(line, f"{width} cells", f"{len(cells)}, the id {shorten(name)}")
        if name in template.rows:
            found = f"{shorten(name)} on line {template.lines[name]} too"
            raise template.error(line, "each id once", found)
        template.rows[name], template.lines[name] = cells, line
    if width < 2 or not template.rows:
        expected = "rows" if format == "neurips" else "a header and rows"
        raise UserError(f"{path}: expected {expected} of an id and a label, found none.")
    return template


def _without_needless(path: Path, rows: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """The rows without the columns that no contest wants."""
    if not rows or any(len(cells) != len(rows[0][1]) for _, cells in rows):
        return rows
    found = [
        column
        for column in foreign_columns(rows[0][1], lambda name: name not in ("", "Usage"))
        if is_needless(column, [cells[column.place] for _, cells in rows[1:]])
    ]
    for column in found:
        log.info("%s: left out: the %s %s", path, column.kind, shorten(column.name))
    return list(without_columns(rows, found))


def _begins_with_label(template: Template, columns: Sequence[str]) -> bool:
    """Whether the first of several columns is the label, of classes whose names are not known.

    Decided by what the columns are called, else by what they hold.
    """
    numbers = [str(label) for label in range(len(columns))]
    if len(columns) < 2 or column_order(columns[1:], numbers[:-1]):
        return True
    if columns[0].startswith("p_") or column_order(columns, numbers):
        return False
    first = {cells[1] for cells in template.rows.values()}
    others = {cell for cells in template.rows.values() for cell in cells[2:]}
    if not all(map(_PLAIN_NUMBER.fullmatch, first | others)):
        return True
    called = columns[0].lower() in _LABEL_COLUMNS
    return "." not in "".join(first) and (called or "." in "".join(others))


def shown_classes(template: Template) -> tuple[list[str], list[str]]:
    """Class names as a template alone shows them: (of its columns, among its labels)."""
    columns = (template.header or [])[1:]
    labelled = _begins_with_label(template, columns)
    names = [name.removeprefix("p_") for name in columns[1 if labelled else 0 :]]
    integers = all(label.removeprefix("-").isdecimal() for label in template.labels)
    return names, sorted(template.labels) if labelled and not integers else []


def read_order(template: Template, class_names: Sequence[str]) -> list[int]:
    """What follows the id in each row of a template: `LABEL_COLUMN` or a class, per column."""
    header = template.header or HEADER
    if len(header) == 2:
        return [LABEL_COLUMN]
    if (classes := column_order(header[1:], class_names)) is not None:
        return classes
    if (classes := column_order(header[2:], class_names)) is not None:
        return [LABEL_COLUMN, *classes]
    expected = f"an id, a label and one column per class ({shorten(', '.join(class_names))})"
    raise template.error(1, expected, shorten(", ".join(header)))


def wants_names(template: Template, class_names: Sequence[str], choice: Labels | None) -> bool:
    """Whether the labels are class names: by choice, else by the template's labels.

    Names that are numbers, but not the classes' indices (1 to N), and a template's labels can fit
    both. A label that stands in every row is a placeholder, which an index need not mean.

    Raises:
        UserError: the labels are neither names nor indices, or may be both.
    """
    if choice or not class_names:
        return choice == "names"
    found, indices = template.labels, {str(label) for label in range(len(class_names))}
    fit_names, fit_indices = found <= set(class_names), found <= indices
    doubtful = any(n.isdecimal() and int(n) != label for label, n in enumerate(class_names))
    if not fit_names and not fit_indices and (doubtful or not _is_placeholder(found)):
        raise _neither(template, class_names)
    if doubtful and fit_indices and (fit_names or len(found) < 2):
        names, labels = shorten(", ".join(class_names)), ", ".join(sorted(found)) or "none"
        expected = f"labels that show whether they are the class names ({names}) or their indices"
        raise UserError(
            f"{template.path}: expected {expected}, found {shorten(labels)}, which leaves both "
            "open; give --labels names or --labels indices."
        )
    return fit_names and bool(found)


def _is_placeholder(labels: set[str]) -> bool:
    return len(labels) == 1 and all(label.removeprefix("-").isdecimal() for label in labels)


def _neither(template: Template, class_names: Sequence[str]) -> UserError:
    """The first label that is neither a class name nor an index."""
    names, last = shorten(", ".join(class_names)), len(class_names) - 1
    rows = [(template.lines[name], cells[1]) for name, cells in template.rows.items() if cells[1]]
    for line, label in rows:
        if not label.removeprefix("-").isdecimal():
            expected = f"labels all integers or all class names ({names})"
            found = "a name among integers" if label in class_names else shorten(label)
            return template.error(line, expected, found)
    line, label = next(row for row in rows if row[1] not in map(str, range(last + 1)))
    expected = f"labels all from 0 to {last} or all class names ({names})"
    return template.error(line, expected, shorten(label))
