"""Checks of the model's outputs, and of the evaluation as a whole."""

from collections.abc import Iterable

import numpy as np

from robust_submission.cli.numbers import percent
from robust_submission.evaluation.checks.rule import Finding, rule, when
from robust_submission.evaluation.results import Check, Results, Share, accuracy
from robust_submission.evaluation.views import Views
from robust_submission.settings import EvaluationSettings


@rule("logits", "Does the model return logits?", "logits")
def check_outputs(softmax: bool) -> Finding:
    """Check that the outputs are not probabilities."""
    found = "probabilities, whose gradients vanish; the adaptive attacks saw their logarithms"
    return when(softmax, "warning"), found if softmax else "logits"


@rule("deterministic", "Does the model give the same answer twice?", "the same answer")
def check_deterministic(random: bool, draws: int, eot: int) -> Finding:
    """Check that two calls do not differ."""
    found = f"it is random: adaptive attacks average up to {eot} draws, {draws} others are scored"
    return when(random, "warning"), found if random else "the same answer"


@rule(
    "each image alone",
    "Does the model answer each image by itself?",
    "the same answer among other images",
)
def check_alone(mixes_images: bool | None) -> Finding:
    """Check that an image's outputs do not depend on its batch; None where that is not known."""
    if mixes_images is None:
        return "not run", "not known: the model cannot be held at one draw"
    found = "no: attacks were made in other batches than they were scored in"
    return when(mixes_images, "failed"), found if mixes_images else "the same answer"


@rule("inside the ball", "Did every attack stay within its epsilon?", "all of them")
def check_ball(distances: np.ndarray, epsilons: np.ndarray) -> Finding:
    """Compare the largest distances from the clean images with the radii."""
    outside = int((distances > epsilons * (1 + 1e-4) + 1e-6).sum())
    return when(outside > 0, "warning"), f"{outside} of {len(epsilons)} did not"


@rule(
    "clean accuracy",
    "Does the model classify clean images?",
    "better than the best constant answer",
)
def check_clean_accuracy(clean: Share, chance: float) -> Finding:
    """Check clean accuracy: at chance, range, normalisation or class order are wrong."""
    suspicious, found = clean.low <= chance, percent(clean.value)
    if suspicious:
        found += "; is its input RGB from 0 to 1, its normalisation inside, its class order ours?"
    return when(suspicious, "warning"), found


def examine_outputs(
    results: Results, views: Views, settings: EvaluationSettings
) -> Iterable[Check]:
    """Run the checks."""
    main = results.plan.main
    distances = [results.arrays[job]["distance"].max(initial=0) for job in main]
    yield check_outputs(views.softmax)
    yield check_deterministic(views.random, settings.draws, settings.eot)
    yield check_alone(views.mixes_images)
    yield check_ball(np.array(distances), np.array([job.epsilon for job in main]))
    yield check_clean_accuracy(accuracy(results.correct), results.chance)
