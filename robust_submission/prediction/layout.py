"""Decides what a prediction file will look like, from the images' names and from a template."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from unicodedata import normalize

from robust_submission.cli.errors import UserError
from robust_submission.prediction.reader import shorten
from robust_submission.prediction.schema import (
    HEADER,
    LABEL_COLUMN,
    SCORE_HEADER,
    Answers,
    Format,
    Labels,
    Layout,
    column_class,
    find_class,
    integer_ids,
)
from robust_submission.prediction.template import (
    Template,
    read_order,
    shown_classes,
    wants_names,
)

NO_ANSWERS = Answers()


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _comparable(names: Iterable[str], composed: bool) -> dict[str, str]:
    """Names by what they are compared by."""
    return {normalize("NFC", name) if composed else name: name for name in names}


def _match_rows(
    template: Template, images: Sequence[str], left_out: Collection[str]
) -> dict[str, str]:
    """The rows that the template asks for: the id as it writes it, and the image's name.

    Names are compared in Unicode's composed form, as macOS decomposes the é of a file name, unless
    two of them are then the same.
    """
    composed = all(len(_comparable(names, True)) == len(names) for names in (images, template.rows))
    known, asked = _comparable(images, composed), _comparable(template.rows, composed)
    if known.keys().isdisjoint(asked):
        stems = {_stem(name): image for name, image in known.items()}
        if len(stems) == len(images) and not stems.keys().isdisjoint(asked):
            known, left_out = stems, [*map(_stem, left_out)]
    if template.header and template.header[0] in known:
        raise template.error(1, "a header", f"the row of {shorten(template.header[0])}")
    rows, left_out = dict[str, str](), set(_comparable(left_out, composed))
    for name, written in asked.items():
        if name in known:
            rows[written] = known[name]
        elif name not in left_out:
            expected = f"the name of one of the {len(known)} images"
            found = f"the unknown id {shorten(written)}"
            raise template.error(template.lines[written], expected, found)
    if missing := [name for name in known if name not in asked]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        last = f"{max(template.lines.values())}, the last"
        found = f"none for {shorten(missing[0])}{others}"
        raise template.error(last, "a row for each image", found)
    return rows


def _find_score_class(
    class_names: Sequence[str], template: Template | None, choice: str | None
) -> int:
    """The label of the class whose probability is the score."""
    column = template.header[1] if template and template.header else ""
    called = column_class(column, class_names)
    if choice is None and (called is not None or len(class_names) == 2):
        return 1 if called is None else called
    label = find_class(class_names, choice, "--score_class")
    if template and called not in (None, label):
        expected = f"a score of {shorten(class_names[label])}, the --score_class"
        raise template.error(1, expected, f"the column {shorten(column)}, another class")
    return label


def _refuse_indices(template: Template, class_names: Sequence[str]) -> None:
    """Refuse indices in a column called after a class, unless they say whether it is that one."""
    column = template.header[1] if template.header else ""
    yes_or_no = 1 if len(class_names) == 2 else None
    if column_class(column, class_names) not in (None, yes_or_no):
        expected = "a column of labels, or fractions (0.5) for a score"
        found = f"the class {shorten(column)}; give --format score or --labels"
        raise template.error(1, expected, found)


def plan_layout(
    format: Format,
    images: Sequence[str],
    class_names: Sequence[str],
    template: Template | None = None,
    answers: Answers = NO_ANSWERS,
    left_out: Collection[str] = (),
) -> Layout:
    """Decide header, ids, order and columns, before anything is predicted.

    Args:
        images: Names of the images (N,), each once.
        class_names: Names in label order (C,).
        template: What to follow. Its ids are names of images or, where none is one, names without
            their endings.
        answers: What a row holds where the template does not say it.
        left_out: Names of images that get no row; the template may have rows for them.

    Raises:
        UserError: names that the profile cannot write; a template with an unknown or missing id,
            with labels that are neither integers nor class names, with other columns, or with one
            called after another class than the score's.
    """
    assert len(images) == len(set(images)) > 0
    for name in images:
        if name.encode(errors="ignore").decode() != name:
            raise UserError(f"{name!a}: expected a file name in UTF-8; rename it.")
    numbers = integer_ids(images) if format == "json" else {}
    rows = _match_rows(template, images, left_out) if template else {name: name for name in images}
    layout = Layout(
        format=format,
        ids={numbers.get(image, written): image for written, image in rows.items()},
        from_template=template is not None,
    )
    if format == "score" or (format == "csv" and template and template.wants_score):
        header = template.header if template else SCORE_HEADER
        if template and len(template.header or ()) != 2:
            found = shorten(", ".join(template.header or ()))
            raise template.error(1, "an id and a score", found)
        if answers.probabilities or answers.labels:
            raise UserError("a score: expected neither --probabilities nor --labels, found one.")
        score_class = _find_score_class(class_names, template, answers.score_class)
        return replace(layout, header=header, columns=[score_class])
    if answers.score_class is not None:
        raise UserError("--score_class: expected --format score or a template of scores.")
    return _with_labels(layout, class_names, template, answers)


def _with_labels(
    layout: Layout, class_names: Sequence[str], template: Template | None, answers: Answers
) -> Layout:
    """The layout of a file of labels, probabilities or both."""
    classes = range(len(class_names)) if answers.probabilities else ()
    header: Sequence[str] | None = [*HEADER, *(f"p_{class_names[label]}" for label in classes)]
    columns, named = [LABEL_COLUMN, *classes], answers.labels == "names"
    _require_indices(answers.labels, layout.format)
    if template:
        prescribed = read_order(template, class_names)
        labelled = prescribed[0] == LABEL_COLUMN
        named = labelled and wants_names(template, class_names, answers.labels)
        if layout.format == "csv":
            header, columns = template.header, prescribed
            if answers.probabilities and columns == [LABEL_COLUMN]:
                raise UserError(f"{template.path}: expected probability columns, found none.")
            if columns == [LABEL_COLUMN] and not named and not answers.labels:
                _refuse_indices(template, class_names)
    return replace(
        layout,
        header=header if layout.format == "csv" else None,
        columns=columns,
        label_names=class_names if named and layout.format != "json" else (),
    )


def _require_indices(labels: Labels | None, format: Format) -> None:
    if labels == "names" and format == "json":
        raise UserError("--labels: expected indices for JSON, which holds integers, found names.")


def expect(
    format: Format,
    *,
    images: Sequence[str] | None = None,
    template: Template | None = None,
    class_names: Sequence[str] = (),
    num_classes: int | None = None,
    labels: Labels | None = None,
) -> Layout:
    """Describe the file that is to be validated.

    Args:
        images: Names of the images: the file must have one row for each, and no other.
        template: The file must have its header, ids, order and kind of labels.
        class_names: Names in label order; by default the template's, where it shows them.
        num_classes: The number of classes, where their names are not given.
        labels: How the labels are to be read; by default as the template has them.

    Raises:
        UserError: the template has another number of classes, or does not fit the images or the
            choice of labels.
    """
    if template and images is None:
        images = [*template.rows]
    if format == "score" or (format == "csv" and template and template.wants_score):
        if labels:
            raise UserError(f"--labels: expected none for a score, found {labels}.")
        layout = Layout(format=format, header=SCORE_HEADER, columns=[0])
        if images is not None:
            layout = plan_layout(format, images, ["score"], template, Answers(score_class="0"))
        return replace(layout, class_names=["score"], num_classes=1)
    known = class_names
    if template and not class_names:
        class_names, shown = shown_classes(template)
        known = class_names or shown
        if num_classes is not None and len(class_names) not in (0, num_classes):
            raise template.error(1, f"{num_classes} classes", f"columns for {len(class_names)}")
    _require_indices(labels, format)
    num_classes = num_classes or len(class_names) or None
    known = known or [str(label) for label in range(num_classes or 0)]
    layout = Layout(format=format)
    if images is not None:
        layout = plan_layout(format, images, known, template, Answers(labels=labels))
    return replace(layout, class_names=class_names, num_classes=num_classes, labels=labels)
