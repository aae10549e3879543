"""Checks of the curves: PGD with growing epsilon and steps, and the minimum-norm attack."""

from collections.abc import Iterable

import numpy as np

from robust_submission.cli.numbers import percent, plural
from robust_submission.evaluation.checks.rule import (
    LARGEST_P_VALUE,
    Finding,
    only_fooled_by,
    rule,
    when,
)
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import Check, Results, accuracy, share_of
from robust_submission.evaluation.views import Views


@rule(
    "large epsilon, {attacker}",
    "Does an attack without bounds succeed?",
    "accuracy at most that of the best constant answer, at epsilon {epsilon:g}",
)
def check_large_epsilon(
    robust: np.ndarray, epsilon: float, chance: float, attacker: Attacker
) -> Finding:
    """Check accuracy, of `robust` bool (n, draws), where every image can become the same grey."""
    found = accuracy(robust)
    outcome = "masking" if attacker == Attacker.OBLIVIOUS else "failed"
    return when(found.low > chance, outcome), percent(found.value)


@rule("epsilon 0", "Does an attack with epsilon 0 change nothing?", "every clean prediction")
def check_epsilon_zero(clean: np.ndarray, attacked: np.ndarray) -> Finding:
    """Compare predictions of clean images, and of the same attacked with epsilon 0."""
    changed = int((clean != attacked).sum())
    return when(changed > 0, "warning"), f"{changed} of {clean.size} predictions differ"


@rule(
    "minimum norm finds what PGD finds",
    "Is the minimum-norm attack behind the curve over epsilon as strong as PGD?",
    "only PGD fools no more than 2 % of images within its radii, beyond chance",
)
def check_nearest(alone: np.ndarray) -> Finding:
    """Count `alone` (n,): images that PGD fools within a radius that is too small for the other."""
    share = share_of(int(alone.sum()), len(alone))
    found = f"only PGD fools {share.count:g} of {plural(share.total, 'image')}"
    return when(share.low > 0.02, "warning"), found


@rule(
    "converged",
    "Do twice the steps change little?",
    "{steps} steps find as much as twice as many, within chance or two points",
)
def check_converged(once: np.ndarray, twice: np.ndarray, steps: int) -> Finding:
    """Compare survival (n,) of adaptive PGD, and of the same with twice the steps."""
    gain = float(once.mean() - twice.mean())
    _, _, p_value = only_fooled_by(twice, once)
    found = (
        f"robust accuracy {percent(once.mean())} after {steps} steps, "
        f"{percent(twice.mean())} after {2 * steps}"
    )
    return when(gain > 0.02 and p_value < LARGEST_P_VALUE, "warning"), found


def examine_curves(results: Results, views: Views) -> Iterable[Check]:
    """Run the checks that the measured curves allow."""
    plan = results.plan
    for attacker, jobs in plan.epsilon_curves.items():
        if attacker == Attacker.OBLIVIOUS or views.hides:
            robust = results.on_curve(jobs[-1])
            yield check_large_epsilon(robust, jobs[-1].epsilon, results.chance, attacker)
    for jobs in list(plan.epsilon_curves.values())[:1]:
        predictions = results.arrays[jobs[0]]["predictions"]
        rows, draws = predictions.shape
        yield check_epsilon_zero(results.clean["predictions"][:rows, :draws], predictions)
    if (nearest := plan.nearest) is not None:
        distances = results.distance(nearest)
        jobs = plan.epsilon_curves[nearest.attacker]
        alone = [~results.on_curve(job)[:, 0] & (distances > job.epsilon) for job in jobs]
        yield check_nearest(np.logical_or.reduce(alone)[results.examined])
    if jobs := plan.steps_curves.get(views.strongest):
        once, twice = (results.survival(results.on_curve(job)) for job in jobs[-2:])
        yield check_converged(once, twice, jobs[-2].steps or 0)
