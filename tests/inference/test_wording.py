"""Numbers and verdicts in words."""

import math

import numpy as np
import pytest

from inference import wording
from inference.schema import share


@pytest.mark.parametrize(
    ("value", "norm", "expected"),
    [
        (8 / 255, "linf", "8/255"),
        (np.float32(8 / 255), "linf", "8/255"),
        (0.2, "linf", "51/255"),
        (0.03, "linf", "0.03"),
        (0.0, "linf", "0"),
        (1.0, "linf", "1"),
        (128 / 255, "l2", "128/255"),
        (0.2, "l2", "0.2"),
        (8.0, "l2", "8"),
        (1600.0, "l1", "1,600"),
        (math.nan, "l2", "not known"),
        (math.inf, "l2", "unbounded"),
    ],
)
def test_radius(value, norm, expected):
    assert wording.radius(float(value), norm) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.94, "94.0 %"), (0.99951, "100.0 %"), (0.0, "0.0 %"), (math.nan, "not known")],
)
def test_percent(value, expected):
    assert wording.percent(value) == expected.replace(" %", wording.SPACE + "%")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "none"),
        (True, "yes"),
        ([], "none"),
        (["a", 1, 0.5], "a, 1, 0.5"),
        ({"step_size": 0.25, "at": {"x": 1}}, "step size 0.25, at x 1"),
        (11173962, "11,173,962"),
        (2023, "2023"),
    ],
)
def test_words(value, expected):
    assert wording.words(value) == expected


def test_reason_names_a_disagreement_without_masking(example):
    apart = example(verdict="no sign of masking", adaptive=share(500, 1000), checks=())
    assert "more than their intervals allow" in wording.reason(apart)
    assert wording.reason(apart).startswith("No check was run.")
    close = example(adaptive=share(935, 1000))
    assert "within their intervals" in wording.reason(close)
