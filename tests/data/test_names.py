"""Classes of some data and of a model, by their names."""

import numpy as np
import pytest

from robust_submission.data.sources import match_classes

ANIMALS = ["bird", "cat", "ship"]


@pytest.mark.parametrize(
    ("labels", "found", "known", "expected"),
    [
        ([0, 1, 2], ["Bird", "CAT", "ship"], ANIMALS, [0, 1, 2]),
        ([0, 1, 2], ["Ship", "bird", "cat"], ANIMALS, [2, 0, 1]),
        ([1, 0, 1], ["bird", "ship"], ANIMALS, [2, 0, 2]),
        ([0, 2], ["bird", "plane", "ship"], ANIMALS, [0, 2]),  # no image of a plane
        ([1, 2, 1], ["0", "1", "2"], ["1", "2"], [0, 1, 0]),  # names, as nothing is called 0
        ([2, 0], ["0", "1", "2"], ["0", "1", "10", "2"], [3, 0]),
        ([0, 2], ["0", "1", "2"], ANIMALS, [0, 2]),  # label.txt and manifests of integers
        ([0, 1], ["0", "1"], ANIMALS, [0, 1]),
        ([0, 2], ANIMALS, ["0", "1", "2"], [0, 2]),
        ([0, 1], ["cafe\u0301", "the\u0301"], ["th\xe9", "caf\xe9"], [1, 0]),
    ],
)
def test_labels_follow_the_names(
    labels: list[int], found: list[str], known: list[str], expected: list[int]
) -> None:
    matched, names = match_classes(np.array(labels), found, known, "data")
    assert matched.tolist() == expected
    assert names == (ANIMALS if ANIMALS in (found, known) else known)


@pytest.mark.parametrize(
    ("found", "known", "unknown"),
    [
        (["bird", "plane"], ANIMALS, "plane"),
        (["bird", "cat", "ships"], ANIMALS, "ships"),
        (["cat", "Cat"], ANIMALS, "cat"),  # one or the other
        (["bird", "cat"], ["0", "1", "2"], "bird"),
        (["0", "1", "2", "3"], ANIMALS, "0"),
        (["1", "2", "3"], ANIMALS, "1"),
    ],
)
def test_other_classes_are_refused_with_both_lists(
    found: list[str], known: list[str], unknown: str
) -> None:
    message = (
        rf"^data: .* \({', '.join(known)}\), found {', '.join(found)}; it does not know {unknown} "
    )
    with pytest.raises(ValueError, match=message):
        match_classes(np.arange(len(found)), found, known, "data")
