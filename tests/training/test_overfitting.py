from types import SimpleNamespace
from typing import Any

import pytest

from robust_submission.training.loop import objective_after
from robust_submission.training.overfitting import collapse_warning, collapsed_epoch


def rows(*accuracies: float) -> list[dict[str, float]]:
    return [{"val_robust_accuracy": each, "val_accuracy": 0.9} for each in accuracies]


@pytest.mark.parametrize(
    ("accuracies", "epoch"),
    [
        ((), None),
        ((0.3,), None),
        ((0.2, 0.3, 0.4, 0.35), None),
        ((0.2, 0.4, 0.2), None),  # half of the best is not below half
        ((0.2, 0.4, 0.19), 3),
        ((0.2, 0.4, 0.0, 0.45, 0.1), 3),  # the first stays the first
        ((0.4, 0.3, 0.21, 0.19), 4),  # against the best, not the one before
        ((0.06, 0.02, 0.07), None),  # less than 0.05 below
    ],
)
def test_a_collapse_is_a_fall_below_half_of_the_best(accuracies: tuple[float, ...], epoch: int):
    assert collapsed_epoch(rows(*accuracies)) == epoch


def test_without_an_attack_there_is_nothing_to_see():
    assert collapsed_epoch([{"val_accuracy": 0.9}, {"val_accuracy": 0.1}]) is None


def test_it_warns_once_and_says_what_follows():
    assert collapse_warning(rows(0.4, 0.3), falls_back=True) is None
    warning = collapse_warning(rows(0.3, 0.4, 0.01), falls_back=True)
    assert warning is not None and "\n" not in warning
    assert "epoch 3" in warning and "0.01 from 0.4" in warning and "goes on with more" in warning
    assert collapse_warning(rows(0.3, 0.4, 0.01, 0.01), falls_back=True) is None
    alone = collapse_warning(rows(0.4, 0.01), falls_back=False)
    assert alone is not None and "train with more objective.steps" in alone


def test_the_epochs_after_a_collapse_fall_back():
    training: Any = SimpleNamespace(objective="one step", fall_back="four steps")
    assert objective_after(training, rows(0.3, 0.4)) == "one step"
    assert objective_after(training, rows(0.3, 0.4, 0.01)) == "four steps"
    assert objective_after(training, rows(0.3, 0.4, 0.01, 0.5)) == "four steps"
    training.fall_back = None
    assert objective_after(training, rows(0.4, 0.01)) == "one step"
