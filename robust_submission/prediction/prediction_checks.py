"""The faults of a prediction file that only all its rows together show: ids, order, labels."""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_submission.prediction.prediction_rows import NONE, Expected, Rows
from robust_submission.prediction.rows import Fault, shorten

LISTED = 20  # missing ids
_INTEGER = re.compile("-?[0-9]+")


def check_ids(rows: Rows, expected: Expected) -> None:
    """Unknown, missing, padded and empty ids; the order where a template prescribes it."""
    known = dict.fromkeys(expected.layout.ids) if expected.layout else None
    if not rows.entries:
        _check_spaces(rows, known)
    if known is None:
        if (row := rows.ids.get("")) is not None:
            rows.fault(row, "id", "an id", "an empty cell", "write the image's file name")
        for row in [row for name, row in rows.ids.items() if rows.entries and name < 0]:
            rows.fault(row, "id", "an integer from 0", "a negative one", "write the image's number")
        return
    for name in sorted(rows.ids.keys() - known.keys(), key=lambda name: rows.ids[name]):
        expects = "an id of the template" if expected.prescribed else "the name of an image"
        fix = "write it as it stands there, or delete the row"
        rows.fault(rows.ids[name], "unknown id", expects, shorten(name), fix)
    _check_missing(rows, list(known))
    if expected.prescribed:
        _check_order(rows, list(known))


def _check_spaces(rows: Rows, known: Collection[str | int] | None) -> None:
    """Spaces around an id, unless a known id has them; the id counts as if they were not there."""
    padded = [name for name in rows.ids if name != name.strip()]
    for name in padded:
        bare = name.strip()
        if known is None or (bare in known and name not in known):
            fix = (
                "delete the spaces"
                if known
                else "delete them, or give --images if the name has them"
            )
            rows.fault(rows.ids[name], "spaces", shorten(bare), shorten(name), fix)
            rows.ids.setdefault(bare, rows.ids.pop(name))


def _check_missing(rows: Rows, known: Sequence[Any]) -> None:
    missing = [name for name in known if name not in rows.ids]
    if missing:
        names = ", ".join(shorten(name) for name in missing[:LISTED])
        if len(missing) > LISTED:
            names += f", … and {len(missing) - LISTED} more"
        found = f"no row for {len(missing)}: {names}"
        fix = "add a row for each"
        rows.faults.add(Fault("missing id", None, f"rows for {len(known)} ids", found, fix))


def _check_order(rows: Rows, known: Sequence[Any]) -> None:
    """Against the template without the ids that are missing, so that one gap is not many faults."""
    ranks = {name: rank for rank, name in enumerate(known)}
    present = [(ranks[name], row) for name, row in rows.ids.items() if name in ranks]
    if not present:
        return
    found, places = np.array(sorted(present, key=lambda pair: pair[1])).T
    wanted = np.sort(found)
    for place in np.flatnonzero(found != wanted).tolist():
        there, here = known[wanted[place]], known[found[place]]
        fix = "sort the rows as the template has them"
        expects = f"{shorten(there)} here, the template's order"
        rows.fault(int(places[place]), "order", expects, shorten(here), fix)


class _Wrong(NamedTuple):
    expected: str
    fix: str


def _judge(label: Any, named: bool, class_names: Sequence[str]) -> int | _Wrong:
    """The class that a written label is (`NONE` where names are not known), or what is wrong."""
    if named:
        if label in class_names or (not class_names and label and label == label.strip()):
            return class_names.index(label) if class_names else NONE
        if label.strip() and (not class_names or label.strip() in class_names):
            return _Wrong(shorten(label.strip()), "delete the spaces")
        known = f"one of {shorten(', '.join(class_names))}" if class_names else "a class name"
        return _Wrong(known, "write a class name")
    limit = f"an integer from 0 to {len(class_names) - 1}" if class_names else "an integer from 0"
    text = str(label)
    if not _INTEGER.fullmatch(text):
        if _INTEGER.fullmatch(text.strip()):
            return _Wrong(text.strip(), "delete the spaces")
        fix = "write the number of the class; if labels are class names, give --class_names"
        return _Wrong(limit, fix if not class_names else "write the number of the class")
    digits = text.lstrip("0") or "0"
    if text.startswith("-") or (class_names and (len(digits), digits) > _largest(class_names)):
        return _Wrong(limit, "count classes from 0, in the order of the class names")
    if digits != text:
        return _Wrong(digits, "delete the leading zeros")
    return int(text) if len(text) < 10 else NONE


def _largest(class_names: Sequence[str]) -> tuple[int, str]:
    largest = str(len(class_names) - 1)
    return len(largest), largest


def _are_names(rows: Rows, expected: Expected, codes: np.ndarray) -> bool:
    """Whether the labels are class names: as the template has it, else as most rows have it."""
    if rows.entries or expected.prescribed:
        return expected.named
    known = set(rows.class_names)
    written = np.array([text.strip() in known and not text.isdecimal() for text in rows.codes])
    return bool(len(codes) and written.size and 2 * written[codes].sum() > len(codes))


def check_labels(rows: Rows, expected: Expected) -> None:
    """Each label against the classes, and against the most probable class where there is one."""
    labels = np.array(rows.labels, dtype=np.int64)
    named = _are_names(rows, expected, labels[labels != NONE])
    verdicts = [_judge(label, named, rows.class_names) for label in rows.codes]
    texts = list(rows.codes)
    wrong = np.array([*(isinstance(verdict, _Wrong) for verdict in verdicts), False])
    for row in np.flatnonzero(wrong[labels]).tolist():
        verdict = verdicts[labels[row]]
        assert isinstance(verdict, _Wrong)
        expects = f"{verdict.expected} as the label"
        rows.fault(row, "label", expects, shorten(texts[labels[row]]), verdict.fix)
    classes = np.array([*(NONE if isinstance(v, _Wrong) else v for v in verdicts), NONE])[labels]
    best = np.array(rows.best, dtype=np.int64)
    for row in np.flatnonzero((classes != best) & (classes != NONE) & (best != NONE)).tolist():
        if classes[row] not in rows.ties.get(row, ()):
            name = rows.class_names[best[row]]
            expects = f"the most probable class, {best[row]} ({shorten(name)})"
            fix = "write the label of the largest probability, and check the columns' order"
            rows.fault(row, "label and probabilities", expects, shorten(texts[labels[row]]), fix)
