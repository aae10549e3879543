"""Catastrophic overfitting: one-step adversarial training that learns to fool its own attack.

Within an epoch the accuracy under PGD falls from its best to about nothing, while that under the
training's one step rises (Wong et al. 2020). Validation measures ten steps each epoch and sees it;
what follows is a function of the rows of metrics.csv alone, so that a resumed run decides the same.
"""

from collections.abc import Mapping, Sequence

METRIC = "val_robust_accuracy"
SHARE = 0.5
"""An epoch has collapsed below this share of the best one before it,"""
LEAST_FALL = 0.05
"""if that is a fall of this much at least: the first epochs rise from nothing, with noise."""


def collapsed_epoch(rows: Sequence[Mapping[str, float]]) -> int | None:
    """The first epoch (from 1) whose accuracy under PGD has collapsed.

    Args:
        rows: One an epoch, as in metrics.csv.

    Returns:
        None where there is none, or where no such accuracy was measured.
    """
    best = 0.0
    for epoch, row in enumerate(rows, start=1):
        accuracy = row.get(METRIC, best)
        if accuracy < SHARE * best and accuracy <= best - LEAST_FALL:
            return epoch
        best = max(best, accuracy)
    return None


def collapse_warning(rows: Sequence[Mapping[str, float]], *, falls_back: bool) -> str | None:
    """A line of warning after the epoch that is the first to have collapsed; None after others."""
    if collapsed_epoch(rows) != len(rows):
        return None
    best = max(row[METRIC] for row in rows)
    remedy = "training goes on with more steps" if falls_back else "train with more objective.steps"
    return (
        f"warning: epoch {len(rows)}: {METRIC} fell to {rows[-1][METRIC]:.4g} from {best:.4g}, "
        f"catastrophic overfitting; {remedy}."
    )
