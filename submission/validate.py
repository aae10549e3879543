"""Says whether a prediction file will be accepted: one line, or every fault with its line.

    python submission/validate.py sub.csv
    python submission/validate.py sub.csv --images DIR --template sample_submission.csv

Lines may end in LF or CRLF, since every grader's reader takes both. A byte order mark, blank
lines and spaces around a cell are refused: some graders take them for a part of the name.
"""

from dataclasses import dataclass, field
from pathlib import Path

from robust_submission.cli.command import Names, run
from robust_submission.cli.errors import UserError
from robust_submission.prediction.faults import Faults
from robust_submission.prediction.formats import Format, choose_format
from robust_submission.prediction.layout import begins_with_label, plan_layout, read_template
from robust_submission.prediction.prediction_checks import check_ids, check_labels
from robust_submission.prediction.prediction_rows import Expected, Rows, gather_csv, gather_json
from robust_submission.prediction.rows import Fault, Table


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to validate, and against what."""

    file: Path = field(metadata={"positional": True})
    """The prediction file."""
    images: Path | None = None
    """The folder of images: there must be one row for each, and no other."""
    template: Path | None = None
    """The contest's sample_submission.csv: header, ids and order must be its own."""
    format: Format | None = None
    """The profile; without it, the ending of the file decides (.csv, .json)."""
    class_names: Names = Names()
    """Class names in label order, separated by commas."""
    num_classes: int | None = None
    """How many classes there are; labels are 0 to one less."""

    def __post_init__(self) -> None:
        count = len(self.class_names) or self.num_classes
        if count is not None and (count < 1 or self.num_classes not in (None, count)):
            found = f"{self.num_classes} and {len(self.class_names)} names"
            raise UserError(f"--num_classes: expected the number of --class_names, found {found}.")


def _classes_of(template: Table) -> tuple[list[str], list[str]]:
    """Class names from a template alone: (those of its columns, those among its labels)."""
    header = template.header or []
    labels = {cells[1] for cells in template.cells} - {""}
    labelled = begins_with_label(template)
    columns = [name.removeprefix("p_") for name in header[2 if labelled else 1 :]]
    if not labelled or all(label.removeprefix("-").isdecimal() for label in labels):
        return columns, []
    return columns, sorted(labels)


def read_expected(options: Options) -> Expected:
    """All that format, images, template and class names tell of the file.

    Raises:
        UserError: an ending without a profile; a faulty template; images that it does not name.
    """
    format = choose_format(options.file, options.format)
    class_names, count = list(options.class_names), options.num_classes
    images = _image_names(options.images) if options.images else None
    template = read_template(options.template, format) if options.template else None
    known = class_names
    if template and not class_names:
        class_names, labels = _classes_of(template)
        known = class_names or labels
        if count is not None and len(class_names) not in (0, count):
            found = f"columns for {len(class_names)}"
            raise UserError(f"{template.path}: line 1: expected {count} classes, found {found}.")
    count = count or len(class_names) or None
    known = known or [str(label) for label in range(count or 0)]
    ids = images if images is not None else template and template.ids
    layout = plan_layout(format, ids, known, template) if ids is not None else None
    return Expected(
        format=format,
        class_names=class_names,
        num_classes=count,
        layout=layout,
        prescribed=template is not None,
        named=bool(layout and layout.label_names),
    )


def _image_names(folder: Path) -> list[str]:
    from robust_submission.data.sources import open_source  # heavy, and only here

    return [str(name) for name in open_source("images", folder).ids]


def check_file(path: Path, expected: Expected) -> tuple[Rows, Faults]:
    """Read a prediction file and find every fault in it."""
    faults = Faults()
    gather = gather_json if expected.format == "json" else gather_csv
    rows = gather(path, expected, faults)
    if not rows.lines and not faults:
        fix = "write the predictions again"
        faults.add(Fault("empty", 1, "a row for each image", "no rows", fix))
    check_ids(rows, expected)
    check_labels(rows, expected)
    return rows, faults


def validate(options: Options) -> None:
    """Print one line where the file is sound.

    Raises:
        UserError: every fault.
    """
    if not options.file.is_file():
        found = "a folder" if options.file.is_dir() else "nothing there"
        raise UserError(f"{options.file}: expected a prediction file, found {found}.")
    rows, faults = check_file(options.file, read_expected(options))
    size = "1 row" if len(rows.lines) == 1 else f"{len(rows.lines)} rows"
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        listed = "\n".join(faults.lines("entries" if rows.entries else "lines"))
        raise UserError(f"{options.file}: {size}, {count}\n{listed}")
    print(f"{options.file}: {size}, valid")


if __name__ == "__main__":
    run(validate, Options)
