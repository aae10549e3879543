"""Numbers and verdicts in words."""

import math
from dataclasses import replace

import numpy as np
import pytest

from robust_submission.cli import numbers
from robust_submission.evaluation.results import share_of
from robust_submission.report import text


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
        (1600.0, "l1", "1600"),
        (math.nan, "l2", "not known"),
        (math.inf, "l2", "unbounded"),
    ],
)
def test_radius(value, norm, expected):
    assert numbers.radius(float(value), norm) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.94, "94.0 %"), (0.99951, "100.0 %"), (0.0, "0.0 %"), (math.nan, "not known")],
)
def test_percent(value, expected):
    assert numbers.percent(value) == expected.replace(" %", numbers.SPACE + "%")


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
    assert text.words(value) == expected


def test_only_radii_are_in_levels_of_linf():
    settings = {"step_size": 0.2, "momentum": 0.8, "epsilon": 0.4}
    assert text.words(settings, "linf") == "step size 51/255, momentum 0.8, epsilon 102/255"


@pytest.mark.parametrize(
    ("num_classes", "expected"), [(2, "50"), (3, "33.3"), (10, "10"), (21841, "0.00458")]
)
def test_chance(num_classes, expected):
    assert numbers.chance(num_classes) == f"{expected}{numbers.SPACE}%"


def test_one_is_no_plural(example):
    assert text.counted(share_of(1, 1)) == "1 of 1 image"
    assert text.counted(share_of(0, 1000)) == "0 of 1,000 images"
    (passed, masking, _) = example().checks
    one = example(verdict="no sign of masking", checks=(passed,))
    assert text.reason(one).startswith("None of 1 check found one.")
    assert text.reason(example(checks=(masking,))).startswith("1 of 1 check shows it.")


def test_a_screen_that_a_check_doubts_asks_for_autoattack(example):
    (passed, *_) = example().checks
    doubt = replace(passed, outcome="warning")
    one = example(verdict="screened only", checks=(passed, doubt))
    assert text.headline(one) == "Screened only; run --attacks autoattack."
    assert text.reason(one).startswith("1 of 2 checks warns") and "--attacks" in text.reason(one)


def test_reason_names_a_disagreement_without_masking(example):
    apart = example(verdict="no sign of masking", adaptive=share_of(500, 1000), checks=())
    assert "more than their intervals allow" in text.reason(apart)
    assert text.reason(apart).startswith("No check was run.")
    close = example(adaptive=share_of(935, 1000))
    assert "within their intervals" in text.reason(close)
