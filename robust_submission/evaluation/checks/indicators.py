"""Checks of one run of adaptive PGD, step by step: the indicators of Pintor et al. (NeurIPS 2022).

Arrays are of the images of the curves that are correct when clean.
"""

from collections.abc import Iterable

import numpy as np

from robust_submission.cli.numbers import plural
from robust_submission.evaluation.checks.rule import Finding, rule, when
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import Check, Results, share_of
from robust_submission.evaluation.views import Views

RARE = 0.02
"""Share of images up to which something that an attack should not do is no sign of failure."""
STILL_RISING = 0.1
"""Rise of the loss late in a run, as `Trajectory.rise` has it, from which on it still rises: a
steady rise has 0.25."""
NO_DIRECTION = 0.05
"""Cosine of successive gradients up to which they are noise; about 0.02 by chance at 32 pixels, and
a hundredth or less in the mean over steps."""


@rule(
    "noise against PGD",
    "Does noise fool images that adaptive PGD does not?",
    f"at most {RARE:.0%} of images, beyond chance",
)
def check_unstable(alone: np.ndarray) -> Finding:
    """Count `alone` (n,): images that a few random points of the ball fool, and PGD does not."""
    share = share_of(int(alone.sum()), len(alone))
    return when(share.low > RARE, "warning"), f"{share.count:g} of {plural(share.total, 'image')}"


@rule(
    "loss has converged",
    "Has the loss of adaptive PGD stopped rising where it does not fool?",
    "on at least 75 % of these images, beyond chance",
)
def check_rising(rise: np.ndarray) -> Finding:
    """Check `rise` (n,), as `Trajectory.rise`, of the images that PGD does not fool."""
    share = share_of(int((rise > STILL_RISING).sum()), len(rise))
    found = f"still rising on {share.count:g} of {plural(share.total, 'image')}"
    return when(share.low > 0.25, "warning"), found


@rule(
    "silent success",
    "Are points that fool PGD's view on the way reported?",
    f"missed on at most {RARE:.0%} of images, beyond chance",
)
def check_silent(missed: np.ndarray, random: bool) -> Finding:
    """Count `missed` (n,): a step fooled, the last point does not, and the image counts as robust.

    For a random model only a warning, as one call in many may fool by chance.
    """
    share = share_of(int(missed.sum()), len(missed))
    found = f"missed on {share.count:g} of {plural(share.total, 'image')}"
    return when(share.low > RARE, "warning" if random else "failed"), found


@rule(
    "view and model agree",
    "Does what fools PGD's view fool the model?",
    f"on all but {RARE:.0%} of images, beyond chance",
)
def check_view(apart: np.ndarray, random: bool) -> Finding:
    """Count `apart` (n,): the view is fooled, the model is not, and the image counts as robust."""
    share = share_of(int(apart.sum()), len(apart))
    found = f"the view alone on {share.count:g} of {plural(share.total, 'image')}"
    return when(share.low > RARE, "warning" if random else "failed"), found


@rule(
    "gradients keep a direction",
    "Do adaptive PGD's successive gradients point the same way?",
    f"cosine above {NO_DIRECTION:g} on at least half of the images, beyond chance",
)
def check_direction(cosine: np.ndarray, random: bool) -> Finding:
    """Check `cosine` (n,), the mean over steps: about 0 or negative where gradients are noise."""
    share = share_of(int((cosine <= NO_DIRECTION).sum()), len(cosine))
    found = f"{np.median(cosine):.2g} (median)"
    return when(share.low > 0.5, "warning" if random else "failed"), found


def examine_indicators(results: Results, views: Views) -> Iterable[Check]:
    """Run the checks, if the run was made."""
    watched = results.plan.watched
    if watched is None or not results.indicators:
        return
    known = results.examined
    found = {name: values[known] for name, values in results.indicators.items()}
    everything = results.plan.headline(*Attacker)
    robust = np.logical_or.reduce(results.worst_case(everything)[: len(known)], axis=1)[known]
    cosine, unfooled = found["cosine"], found["fooled"] == 0
    yield check_unstable((found["unstable"] > 0) & unfooled)
    yield check_rising(found["rise"][unfooled & np.isfinite(found["rise"])])
    stops = [job for job in everything if (job.attack, job.attacker) == ("pgd", watched.attacker)]
    missed = (found["silent"] > 0) & robust
    yield check_silent(missed if stops else missed[:0], views.random)
    yield check_view((found["view_only"] > 0) & robust, views.random)
    yield check_direction(cosine[np.isfinite(cosine)], views.random)
