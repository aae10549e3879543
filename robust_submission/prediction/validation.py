"""Finds every fault of a prediction file, each with its line."""

import re
from collections import Counter
from collections.abc import Iterable, Sized
from operator import itemgetter
from pathlib import Path
from unicodedata import normalize

import numpy as np

from robust_submission.cli.errors import UserError
from robust_submission.prediction.columns import PredictionColumns, read_columns
from robust_submission.prediction.reader import Fault, shorten
from robust_submission.prediction.schema import Layout

SHOWN = 20
"""Faults of each kind that are put in words, and missing ids that are named."""
TOLERANCE, TOLERANCE_PER_CLASS = 1e-3, 5.1e-7
"""Of a sum of probabilities: six decimals err by 5e-7 per class at most, and float32 adds to it."""
_INTEGER = re.compile("0|[1-9][0-9]*")


def validate_file(path: Path, layout: Layout) -> str:
    """Words for the size of a sound prediction file, such as "260 rows".

    Raises:
        UserError: every fault, a line each; or the file cannot be read.
    """
    faults = list[Fault]()
    columns = read_columns(path, layout, faults.append)
    if not columns.lines and not faults:
        fix = "write the predictions again"
        faults.append(Fault("empty", 1, "a row for each image", "no rows", fix))
    _check_ids(columns, layout)
    named = _labels_are_names(columns, layout)
    _check_labels(columns, layout, named)
    if not layout.is_score:
        _check_probabilities(columns, named)
    size = _count(columns.lines, "row")
    if faults:
        lines = [f"{path}: {size}, {_count(faults, 'fault')}", *_list_faults(faults)]
        raise UserError("\n".join(lines))
    return size


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _list_faults(faults: Iterable[Fault]) -> list[str]:
    """One text per fault, by line; then one per kind of which there are more than `SHOWN`."""
    shown, further, counts = list[Fault](), dict[str, list[str]](), Counter[str]()
    for fault in faults:
        counts[fault.kind] += 1
        if counts[fault.kind] <= SHOWN:
            shown.append(fault)
        else:
            further.setdefault(fault.kind, []).append(str(fault.line or 0))
    shown.sort(key=lambda fault: (fault.line or 1 << 62, fault.entry or 0))
    texts = [str(fault) for fault in shown]
    for kind, lines in further.items():
        places = ", ".join(lines[:SHOWN]) + (", …" if len(lines) > SHOWN else "")
        texts.append(f"{len(lines)} more of the kind '{kind}', lines {places}")
    return texts


def _check_ids(columns: PredictionColumns, layout: Layout) -> None:
    """Padded, duplicated, unknown and missing ids, and the order that a template has."""
    known = layout.ids
    rows = dict[str | int, int]()  # the first of each id
    for row, name in enumerate(columns.ids):
        if name is None:
            continue
        bare = name.strip() if isinstance(name, str) else name
        if bare != name and (not known or (bare in known and name not in known)):
            fix = "delete the spaces; if the image's name has them, give --images"
            columns.fault(row, "spaces", shorten(bare), shorten(name), fix)
            name = bare
        if (first := rows.setdefault(name, row)) != row:
            place = f"entry {first + 1}" if columns.entries else f"line {columns.lines[first]}"
            found = f"{shorten(name)} on {place} already"
            columns.fault(row, "duplicated id", "each id once", found, "delete one of the two")
    if known:
        _compare_ids(columns, rows, layout)


def _compare_ids(columns: PredictionColumns, rows: dict[str | int, int], layout: Layout) -> None:
    """The first row of each id against the ids of the layout."""
    unknown = [name for name in rows if name not in layout.ids]
    composed = {normalize("NFC", str(name)): name for name in layout.ids if unknown}
    for name in unknown:
        expected = "an id of the template" if layout.from_template else "the name of an image"
        row, found = rows.pop(name), shorten(name)
        twin = composed.get(normalize("NFC", str(name)))
        if isinstance(twin, str) and twin not in rows:
            expected = ascii(twin)
            found = f"{name!a}, which only looks the same (another Unicode form)"
            rows[twin] = row
        fix = "write it as it stands there, or delete the row"
        columns.fault(row, "unknown id", expected, found, fix)
    if missing := [name for name in layout.ids if name not in rows]:
        names = ", ".join(map(shorten, missing[:SHOWN]))
        if len(missing) > SHOWN:
            names += f", … and {len(missing) - SHOWN} more"
        expected, found = f"rows for {len(layout.ids)} ids", f"no row for {len(missing)}: {names}"
        columns.report(Fault("missing id", None, expected, found, "add a row for each"))
    if layout.from_template:  # without the missing ids, so that one gap is not many faults
        wanted = (name for name in layout.ids if name in rows)
        for name, (found, row) in zip(wanted, sorted(rows.items(), key=itemgetter(1)), strict=True):
            if name != found:
                expected = f"{shorten(name)} here, the template's order"
                fix = "sort the rows as the template has them"
                columns.fault(row, "order", expected, shorten(found), fix)


def _labels_are_names(columns: PredictionColumns, layout: Layout) -> bool:
    """Whether the labels are class names: as the layout has it, else as most rows have it."""
    if layout.labels is not None:
        return layout.labels == "names"
    if columns.entries or layout.from_template:
        return bool(layout.label_names)
    written = Counter(label for label in columns.labels if isinstance(label, str))
    known = set(columns.class_names)
    names = [label for label in written if label.strip() in known and not label.isdecimal()]
    return 2 * sum(written[name] for name in names) > written.total()


def _check_labels(columns: PredictionColumns, layout: Layout, named: bool) -> None:
    """Each label against the classes; where these are unknown, any name or any integer is one."""
    names, count = columns.class_names, len(columns.class_names)
    numbers = {str(number) for number in range(count)}
    if layout.labels and not layout.class_names and numbers == {*names}:
        names = ()  # only their number is known

    def is_right(label: str) -> bool:
        if named:
            return label in names if names else label == label.strip() != ""
        return bool(_INTEGER.fullmatch(label)) and (not count or label in numbers)

    if named:
        expected = f"one of {shorten(', '.join(names))}" if names else "a class name"
        fix = "write a class name"
    else:
        expected = f"an integer from 0 to {count - 1}" if count else "an integer from 0"
        fix = "write the number of the class, from 0 in the order of the class names"
        fix += "" if count else "; if labels are class names, give --class_names or --labels names"
    wrong = {label for label in set(columns.labels) - {None} if not is_right(str(label))}
    for row, label in enumerate(columns.labels if wrong else ()):
        if label in wrong:
            own_fix = "delete the spaces" if is_right(str(label).strip()) else fix
            columns.fault(row, "label", f"{expected} as the label", shorten(label), own_fix)


def _check_probabilities(columns: PredictionColumns, named: bool) -> None:
    """Each row's probabilities sum to 1, and its label has the largest of them."""
    rows, shares = columns.probabilities()
    names = columns.class_names if named else [str(label) for label in range(shares.shape[1])]
    numbers = {name: label for label, name in enumerate(names)}
    labels = np.array([numbers.get(str(columns.labels[row]), -1) for row in rows], int)
    totals = shares.sum(1, dtype=np.float64)
    complete = abs(totals - 1) <= max(TOLERANCE, TOLERANCE_PER_CLASS * shares.shape[1])
    for place in np.flatnonzero(~complete).tolist():
        found, fix = f"a sum of {totals[place]:.6f}", "write one probability for every class"
        columns.fault(rows[place], "sum", "probabilities that sum to 1", found, fix)
    less = shares[np.arange(len(rows)), labels] < shares.max(1, initial=0)
    for place in np.flatnonzero(complete & (labels >= 0) & less).tolist():
        best = int(shares[place].argmax())
        expected = f"the most probable class, {best} ({shorten(columns.class_names[best])})"
        fix = "write the label of the largest probability, and check the columns' order"
        found = shorten(columns.labels[rows[place]])
        columns.fault(rows[place], "label and probabilities", expected, found, fix)
