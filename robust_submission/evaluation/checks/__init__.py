"""Runs the masking checks on the results.

Each check is a pure function of measured numbers. One that compares attacks does so per image, and
is suspicious only if chance does not explain the difference: an honest model evaluated on 100
images passes.
Sources: Athalye et al. 2018, Carlini et al. 2019, Tramèr et al. 2020, Croce & Hein 2020, Pintor et
al. 2022.
"""

from collections.abc import Iterable
from typing import Literal

from robust_submission.evaluation.checks.comparisons import compare_attackers
from robust_submission.evaluation.checks.curves import examine_curves
from robust_submission.evaluation.checks.gradients import examine_gradients
from robust_submission.evaluation.checks.indicators import examine_indicators
from robust_submission.evaluation.checks.outputs import examine_outputs
from robust_submission.evaluation.checks.strength import examine_strength
from robust_submission.evaluation.results import Check, Results
from robust_submission.evaluation.views import Views
from robust_submission.settings import EvaluationSettings

MaskingVerdict = Literal["masked", "no sign of masking", "evaluation failed", "screened only"]
NEEDS_NO_PROOF = 0.05
"""Adaptive accuracy up to which it does not matter how much stronger an attack could be."""


def run_checks(results: Results, views: Views, settings: EvaluationSettings) -> list[Check]:
    """Run every check that the measurements allow."""
    return [
        *compare_attackers(results, views),
        *examine_gradients(results, views),
        *examine_curves(results, views),
        *examine_indicators(results, views),
        *examine_strength(results, views, settings),
        *examine_outputs(results, views, settings),
    ]


def verdict(checks: Iterable[Check], adaptive: float, screened: bool = False) -> MaskingVerdict:
    """What the checks say together.

    Args:
        checks: All of them.
        adaptive: Robust accuracy (adaptive), 0 to 1.
        screened: `Plan.screened`: then whatever is not in order calls for AutoAttack itself.
    """
    outcomes = {check.outcome for check in checks}
    if "failed" in outcomes and adaptive > NEEDS_NO_PROOF:
        return "evaluation failed"
    if "masking" in outcomes:
        return "masked"
    doubtful = screened and not outcomes <= {"ok", "not run"}
    return "screened only" if doubtful else "no sign of masking"
