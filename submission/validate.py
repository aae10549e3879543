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
from robust_submission.prediction.layout import expect
from robust_submission.prediction.schema import Format, Labels, choose_format
from robust_submission.prediction.template import read_template
from robust_submission.prediction.validation import validate_file


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
    labels: Labels | None = None
    """Whether labels are class names or indices; by default as the template has them, without one
    as most rows have them."""

    def __post_init__(self) -> None:
        count, names = self.num_classes, len(self.class_names)
        if count is not None and count < 1:
            raise UserError(f"--num_classes: expected at least 1, found {count}.")
        if names and count not in (None, names):
            expected = f"{names}, the number of --class_names"
            raise UserError(f"--num_classes: expected {expected}, found {count}.")


def main(options: Options) -> None:
    """Print one line where the file is sound.

    Raises:
        UserError: every fault.
    """
    format = choose_format(options.file, options.format)
    expected = expect(
        format,
        images=_image_names(options.images) if options.images else None,
        template=read_template(options.template, format) if options.template else None,
        class_names=options.class_names,
        num_classes=options.num_classes,
        labels=options.labels,
    )
    print(f"{options.file}: {validate_file(options.file, expected)}, valid")


def _image_names(folder: Path) -> list[str]:
    from robust_submission.data.sources import open_source  # heavy, and needed only here

    return open_source("images", folder).ids.tolist()


if __name__ == "__main__":
    run(main, Options)
