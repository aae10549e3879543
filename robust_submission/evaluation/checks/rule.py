"""What a check is made of: its texts, its finding, and the test for chance."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import numpy as np

from robust_submission.evaluation.results import Check, Outcome

LARGEST_P_VALUE = 0.01
"""Largest probability, if there were no difference, at which a difference counts."""
Finding = tuple[Outcome, str]
"""A check's outcome, and what was found, in words."""
_P = ParamSpec("_P")


def rule(
    name: str, question: str, expected: str
) -> Callable[[Callable[_P, Finding]], Callable[_P, Check]]:
    """Make a function that returns a finding one that returns a check.

    In the texts, `{argument}` stands for an argument of the function. With an empty array as the
    first argument the check is not run.
    """

    def decorate(find: Callable[_P, Finding]) -> Callable[_P, Check]:
        @wraps(find)
        def check(*args: _P.args, **kwargs: _P.kwargs) -> Check:
            arguments = inspect.signature(find).bind(*args, **kwargs).arguments
            first = next(iter(arguments.values()))
            empty = isinstance(first, np.ndarray) and not len(first)
            outcome, found = ("not run", "nothing to check") if empty else find(*args, **kwargs)
            return Check(
                name=name.format(**arguments),
                question=question.format(**arguments),
                expected=expected.format(**arguments),
                outcome=outcome,
                found=found,
            )

        return check

    return decorate


def when(suspicious: bool, outcome: Outcome) -> Outcome:
    """The outcome if the numbers are suspicious, else "ok"."""
    return outcome if suspicious else "ok"


def only_fooled_by(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Compare two attacks on the same images.

    Args:
        first: (n,), how much of each image survives the first attack: 0 or 1, or between them for
            a random model.
        second: The same for the second attack.

    Returns:
        The number of images that the first harms more, the number that the second harms more, and
        the probability that the former exceeds the latter by so much by chance (sign test).
    """
    from scipy.stats import binomtest  # takes a second

    more, less = int((first < second).sum()), int((first > second).sum())
    if more + less == 0:
        return 0, 0, 1.0
    return more, less, float(binomtest(more, more + less, alternative="greater").pvalue)
