"""The check of the attack's strength: whether it finds adversarial examples known to exist."""

from collections.abc import Iterable

from robust_submission.evaluation.checks.rule import Finding, rule, when
from robust_submission.evaluation.results import Check, Planted, Results
from robust_submission.evaluation.views import Views
from robust_submission.settings import EvaluationSettings

LEAST_FOUND = 0.8
"""Share of the planted examples that an attack must find, within chance."""


@rule(
    "finds planted examples",
    "Does adaptive PGD find adversarial examples that are known to exist?",
    f"at least {100 * LEAST_FOUND:.0f} % of them, within chance",
)
def check_planted(planted: Planted | None, reason: str) -> Finding:
    """Check how much is found of what was planted; `reason` says why if nothing was."""
    if planted is None:
        return "not run", f"not known: {reason}"
    return when(planted.found.high < LEAST_FOUND, "failed"), planted.words


def examine_strength(
    results: Results, views: Views, settings: EvaluationSettings
) -> Iterable[Check]:
    """Run the check, or say why it could not be run."""
    if results.planted:
        reason = "nothing could be planted"
    elif not settings.curves:
        reason = "the curves were not asked for"
    elif not views.has_gradient(views.strongest):
        reason = "the adaptive attacker has no gradient"
    elif not views.repeats:
        reason = "the model draws from a generator of its own"
    else:
        reason = "the last layer was not found"
    yield check_planted(results.planted_shares, reason)
