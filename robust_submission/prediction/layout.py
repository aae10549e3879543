"""What a prediction file looks like before anything is predicted: header, rows, columns.

A template is a contest's sample_submission.csv; it prescribes header, ids, row order and whether
labels are integers or class names.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from robust_submission.cli.errors import UserError
from robust_submission.prediction.rows import Table, read_table, shorten

HEADER = ("image_id", "label")
_INTEGER_NAME = re.compile(r"(?:.*/)?([0-9]+)(?:\.[^./]*)?", re.DOTALL)
_NUMBER = re.compile(r"[0-9]*\.?[0-9]*(e-?[0-9]+)?", re.IGNORECASE)
_LABEL_COLUMNS = ("label", "category", "category_id", "class", "class_id", "target", "prediction")
LABEL = -1  # stands for the label among the columns of class probabilities


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Header, rows and columns of a prediction file."""

    header: Sequence[str] | None
    ids: Sequence[str | int]
    """As written, row by row."""
    order: Sequence[int]
    """For each row, the index of its image."""
    columns: Sequence[int]
    """What follows the id: `LABEL`, or the class whose probability it is."""
    label_names: Sequence[str] | None
    """Class names where the labels are written as such; None for integers."""

    @property
    def needs_probabilities(self) -> bool:
        return any(column != LABEL for column in self.columns)


def read_template(path: Path, format: str = "csv") -> Table:
    """Read a template: CSV, with a header unless the format is `neurips`.

    A byte order mark, CRLF and blank lines are tolerated here; none is carried on.

    Raises:
        UserError: no CSV, no rows, an empty id, an id twice, a row of another length.
    """
    if path.suffix.lower() == ".json":
        raise UserError(f"{path}: expected a CSV file as the template, found JSON.")
    return read_table(path, format != "neurips", tolerated=("byte order mark", "blank line"))


def column_order(columns: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    """The class of each probability column, or None where the columns are not the classes.

    A class has its column under its name, `p_` and its name, its number, or `p_` and its number.
    """
    numbers = [str(label) for label in range(len(class_names))]
    for names in (class_names, numbers):
        for prefix in ("p_", ""):
            labels = {f"{prefix}{name}": label for label, name in enumerate(names)}
            if labels.keys() == set(columns) and len(columns) == len(labels):
                return [labels[column] for column in columns]
    return None


def read_columns(table: Table, class_names: Sequence[str]) -> list[int]:
    """What follows the id in a file with a header: `LABEL` or a class, column by column.

    Raises:
        UserError: columns that are neither a label, nor one probability a class, nor both.
    """
    header = table.header
    if header is None:
        return [LABEL, *range(len(table.cells[0]) - 2)]
    if len(header) == 2:
        return [LABEL]
    if (classes := column_order(header[1:], class_names)) is not None:
        return classes
    if (classes := column_order(header[2:], class_names)) is not None:
        return [LABEL, *classes]
    expected = f"an id, a label and one column a class ({shorten(', '.join(class_names))})"
    found = shorten(", ".join(header))
    raise UserError(f"{table.path}: line 1: expected {expected}, found {found}.")


def begins_with_label(table: Table) -> bool:
    """Whether a label follows the id in a file with a header, of classes whose names are not known:
    by `column_order` of their numbers, or by what the columns are called and hold."""
    columns = (table.header or [])[1:]
    numbers = [str(label) for label in range(len(columns))]
    if len(columns) < 2 or column_order(columns[1:], numbers[:-1]):
        return True
    if columns[0].startswith("p_") or column_order(columns, numbers):
        return False
    first = {row[1] for row in table.cells}
    others = {cell for row in table.cells for cell in row[2:]}
    if not all(map(_NUMBER.fullmatch, first | others)):
        return True
    called = columns[0].lower() in _LABEL_COLUMNS
    return "." not in "".join(first) and (called or "." in "".join(others))


def wants_names(table: Table, columns: Sequence[int], class_names: Sequence[str]) -> bool:
    """Whether the labels are class names; a class named "3" counts as a name first.

    Raises:
        UserError: a label that is neither a class name nor an integer.
    """
    if columns[0] != LABEL:
        return False
    known = set(class_names)
    labels = {cells[1] for cells in table.cells} - {""}
    if labels <= known:
        return bool(labels)
    for line, cells in zip(table.lines, table.cells, strict=True):
        if cells[1] and not cells[1].removeprefix("-").isdecimal():
            expected = f"labels all integers or all class names ({shorten(', '.join(class_names))})"
            found = "a name among integers" if cells[1] in known else shorten(cells[1])
            raise UserError(f"{table.path}: line {line}: expected {expected}, found {found}.")
    return False


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _match_rows(
    template: Table, ids: Sequence[str], skipped: Collection[str]
) -> tuple[list[str], list[int]]:
    """The template's rows: (ids as it writes them, index of each one's image)."""
    images = {name: index for index, name in enumerate(ids)}
    skipped = set(skipped)
    if images.keys().isdisjoint(template.ids):
        stems = {_stem(name): index for name, index in images.items()}
        if len(stems) == len(images) and not stems.keys().isdisjoint(template.ids):
            images, skipped = stems, {_stem(name) for name in skipped}
    if template.header and template.header[0] in images:
        found = f"the row of {shorten(template.header[0])}"
        raise UserError(f"{template.path}: line 1: expected a header, found {found}.")
    unknown = set(template.ids) - images.keys() - skipped
    if unknown:
        line, name = next(
            row for row in zip(template.lines, template.ids, strict=True) if row[1] in unknown
        )
        expected = f"the name of one of the {len(images)} images"
        found = f"the unknown id {shorten(name)}"
        raise UserError(f"{template.path}: line {line}: expected {expected}, found {found}.")
    rows = [name for name in template.ids if name in images]
    if missing := images.keys() - set(rows):
        first = shorten(min(missing, key=lambda name: images[name]))
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        last = f"line {template.lines[-1]}, the last"
        raise UserError(
            f"{template.path}: {last}: expected a row an image, missing {first}{others}."
        )
    return rows, [images[name] for name in rows]


def integer_ids(ids: Sequence[str]) -> list[int]:
    """The integers that the file names are, as the JSON profile wants: `test/17.png` -> 17.

    Raises:
        UserError: a name that is no integer, or two names with one integer.
    """
    names = dict[int, str]()
    for name in ids:
        stem = _INTEGER_NAME.fullmatch(name)
        if not stem:
            raise UserError(f"{name!r}: expected an integer file name for JSON, such as 17.png.")
        number = int(stem[1])
        if (other := names.setdefault(number, name)) != name:
            raise UserError(f"{name!r}: expected one image {number}, found also {other!r}.")
    return list(names)


def _check_ids(ids: Sequence[str]) -> None:
    if not ids:
        raise UserError("expected at least one prediction to write, found none.")
    double, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise UserError(f"{double!r}: expected each image once, found it {count} times.")
    for name in ids:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name!a}: expected a file name in UTF-8; rename it.") from error


def plan_layout(
    format: str,
    ids: Sequence[str],
    class_names: Sequence[str],
    template: Path | Table | None = None,
    probabilities: bool = False,
    skipped: Collection[str] = (),
) -> Layout:
    """Decide header, ids, order and columns; call it early, so that faults show before the work.

    Args:
        class_names: Names in label order (C,).
        template: A CSV file to follow (without a header where the format is `neurips`). Its ids
            are names of images or, where none is one, names without their endings.
        probabilities: One more column a class.
        skipped: Names of images without a prediction (the template's rows of them are left out).

    Raises:
        UserError: names that the profile cannot write; a template with an unknown, missing or
            double id, with labels that are neither integers nor class names, or with other columns.
    """
    ids = [str(name) for name in ids]
    _check_ids(ids)
    numbers = integer_ids(ids) if format == "json" else None
    classes = list(range(len(class_names))) if probabilities else []
    header, columns, names = None, [LABEL, *classes], None
    if format == "csv":
        header = [*HEADER, *(f"p_{class_names[label]}" for label in classes)]
    rows, order = ids, list(range(len(ids)))
    if template:
        table = template if isinstance(template, Table) else read_template(template, format)
        rows, order = _match_rows(table, ids, skipped)
        prescribed = read_columns(table, class_names)
        names = class_names if wants_names(table, prescribed, class_names) else None
        if format == "csv":
            header, columns = table.header, prescribed
            if probabilities and columns == [LABEL]:
                raise UserError(f"{table.path}: expected probability columns, found none.")
    if numbers:
        rows, names = [numbers[image] for image in order], None
    return Layout(header=header, ids=rows, order=order, columns=columns, label_names=names)
