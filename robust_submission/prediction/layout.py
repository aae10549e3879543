"""Decides what a prediction file will look like, from the images' names and from a template."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from robust_submission.cli.errors import UserError
from robust_submission.prediction.reader import Fault, csv_rows, shorten
from robust_submission.prediction.schema import (
    HEADER,
    LABEL_COLUMN,
    Format,
    Layout,
    column_order,
    integer_ids,
)

_PLAIN_NUMBER = re.compile(r"[0-9]*\.?[0-9]*(e-?[0-9]+)?", re.IGNORECASE)
_LABEL_COLUMNS = ("label", "category", "category_id", "class", "class_id", "target", "prediction")


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

    def error(self, line: int | str, expected: str, found: str) -> UserError:
        """A fault of a line, to be raised."""
        return UserError(f"{self.path}: line {line}: expected {expected}, found {found}.")


def read_template(path: Path, format: Format) -> Template:
    """Read a template: CSV, with a header unless the format is `neurips`.

    Raises:
        UserError: unreadable, no CSV, no rows, an empty id, an id twice, a row of another length.
            A byte order mark and blank lines are ignored.
    """

    def report(fault: Fault) -> None:
        if fault.kind not in ("byte order mark", "blank line"):
            raise UserError(f"{path}: {fault}")

    if path.suffix.lower() == ".json":
        raise UserError(f"{path}: expected a CSV file as the template, found JSON.")
    stream = csv_rows(path, report)
    header = None if format == "neurips" else next(stream, (1, []))[1]
    template = Template(path=path, header=header, rows={}, lines={})
    width = len(header or ())
    for line, cells in stream:
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


def _shown_classes(template: Template) -> tuple[list[str], list[str]]:
    """Class names as a template alone shows them: (of its columns, among its labels)."""
    columns = (template.header or [])[1:]
    labelled = _begins_with_label(template, columns)
    names = [name.removeprefix("p_") for name in columns[1 if labelled else 0 :]]
    integers = all(label.removeprefix("-").isdecimal() for label in template.labels)
    return names, sorted(template.labels) if labelled and not integers else []


def _read_columns(template: Template, class_names: Sequence[str]) -> list[int]:
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


def _wants_names(template: Template, class_names: Sequence[str]) -> bool:
    """Whether the labels are class names; a class named "3" counts as a name first."""
    if template.labels <= set(class_names):
        return bool(template.labels)
    for name, cells in template.rows.items():
        if cells[1] and not cells[1].removeprefix("-").isdecimal():
            expected = f"labels all integers or all class names ({shorten(', '.join(class_names))})"
            found = "a name among integers" if cells[1] in class_names else shorten(cells[1])
            raise template.error(template.lines[name], expected, found)
    return False


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _match_rows(
    template: Template, images: Sequence[str], left_out: Collection[str]
) -> dict[str, str]:
    """The rows that the template asks for: the id as it writes it, and the image's name."""
    known = {name: name for name in images}
    if known.keys().isdisjoint(template.rows):
        stems = {_stem(name): name for name in images}
        if len(stems) == len(images) and not stems.keys().isdisjoint(template.rows):
            known, left_out = stems, [*map(_stem, left_out)]
    if template.header and template.header[0] in known:
        raise template.error(1, "a header", f"the row of {shorten(template.header[0])}")
    rows, left_out = dict[str, str](), set(left_out)
    for name, line in template.lines.items():
        if name in known:
            rows[name] = known[name]
        elif name not in left_out:
            expected = f"the name of one of the {len(known)} images"
            raise template.error(line, expected, f"the unknown id {shorten(name)}")
    if missing := [name for name in known if name not in rows]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        last = f"{max(template.lines.values())}, the last"
        found = f"none for {shorten(missing[0])}{others}"
        raise template.error(last, "a row for each image", found)
    return rows


def plan_layout(
    format: Format,
    images: Sequence[str],
    class_names: Sequence[str],
    template: Template | None = None,
    probabilities: bool = False,
    left_out: Collection[str] = (),
) -> Layout:
    """Decide header, ids, order and columns, before anything is predicted.

    Args:
        images: Names of the images (N,), each once.
        class_names: Names in label order (C,).
        template: What to follow. Its ids are names of images or, where none is one, names without
            their endings.
        probabilities: Whether to add a column per class.
        left_out: Names of images that get no row; the template may have rows for them.

    Raises:
        UserError: names that the profile cannot write; a template with an unknown or missing id,
            with labels that are neither integers nor class names, or with other columns.
    """
    assert len(images) == len(set(images)) > 0
    for name in images:
        if name.encode(errors="ignore").decode() != name:
            raise UserError(f"{name!a}: expected a file name in UTF-8; rename it.")
    numbers = integer_ids(images) if format == "json" else {}
    classes = range(len(class_names)) if probabilities else ()
    header = [*HEADER, *(f"p_{class_names[label]}" for label in classes)]
    columns, named, rows = [LABEL_COLUMN, *classes], False, {name: name for name in images}
    if template:
        rows = _match_rows(template, images, left_out)
        prescribed = _read_columns(template, class_names)
        named = prescribed[0] == LABEL_COLUMN and _wants_names(template, class_names)
        if format == "csv":
            header, columns = template.header, prescribed
            if probabilities and columns == [LABEL_COLUMN]:
                raise UserError(f"{template.path}: expected probability columns, found none.")
    return Layout(
        format=format,
        header=header if format == "csv" else None,
        ids={numbers.get(name, spelled): name for spelled, name in rows.items()},
        columns=columns,
        label_names=class_names if named and format != "json" else (),
        from_template=template is not None,
    )


def expect(
    format: Format,
    *,
    images: Sequence[str] | None = None,
    template: Template | None = None,
    class_names: Sequence[str] = (),
    num_classes: int | None = None,
) -> Layout:
    """Describe the file that is to be validated.

    Args:
        images: Names of the images: the file must have one row for each, and no other.
        template: The file must have its header, ids, order and kind of labels.
        class_names: Names in label order; by default the template's, where it shows them.
        num_classes: The number of classes, where their names are not given.

    Raises:
        UserError: the template has another number of classes, or does not fit the images.
    """
    known = class_names
    if template and not class_names:
        class_names, labels = _shown_classes(template)
        known = class_names or labels
        if num_classes is not None and len(class_names) not in (0, num_classes):
            raise template.error(1, f"{num_classes} classes", f"columns for {len(class_names)}")
    num_classes = num_classes or len(class_names) or None
    if template and images is None:
        images = [*template.rows]
    known = known or [str(label) for label in range(num_classes or 0)]
    layout = Layout(format=format)
    if images is not None:
        layout = plan_layout(format, images, known, template)
    return replace(layout, class_names=class_names, num_classes=num_classes)
