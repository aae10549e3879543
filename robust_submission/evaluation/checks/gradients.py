"""Checks of the gradients at the clean images."""

from collections.abc import Iterable

import numpy as np

from robust_submission.cli.numbers import percent, plural
from robust_submission.evaluation.checks.rule import Finding, rule, when
from robust_submission.evaluation.results import Check, Results, share_of
from robust_submission.evaluation.views import Views

RATIO_RANGE = (0.1, 1e6)
"""Plausible L1 norms of the margin's gradient divided by the margin. The inverse is the L-infinity
epsilon that would fool a linear model: above 10 the gradient has vanished, below 1e-6 it has been
blown up (with GCM about 1e-12), as pixels are 0 to 1 in steps of 1/255."""


@rule("differentiable", "Can autograd differentiate the model?", "yes")
def check_gradient_exists(differentiable: bool, replaced: bool) -> Finding:
    """Check that autograd can differentiate the outputs with respect to the images."""
    if differentiable:
        return "ok", "yes"
    if replaced:
        return (
            "warning",
            "no: only adaptive attacks had a gradient, passed straight through the cut",
        )
    return "failed", "no: no attack had a gradient of the model"


@rule("autograd in the model", "Does the model optimise when it is called?", "no")
def check_optimises(optimises: bool) -> Finding:
    """Check that the model does not call autograd itself, as purification does."""
    found = "yes: attacks need more steps and other losses than these" if optimises else "no"
    return when(optimises, "warning"), found


@rule(
    "finite gradients",
    "Is every gradient a finite number?",
    "no NaN; masking if on more than 2 % of images, beyond chance",
)
def check_finite(gradient: np.ndarray) -> Finding:
    """Look for NaN in `gradient` (n,), which stands for a gradient that is not finite.

    An honest model may divide by zero on an image of one colour.
    """
    bad = share_of(int(np.isnan(gradient).sum()), len(gradient))
    found = f"NaN or infinite on {plural(int(bad.count), 'image')}"
    return "masking" if bad.low > 0.02 else when(bad.count > 0, "warning"), found


@rule(
    "gradients there",
    "Do gradients reach the image?",
    "zero on less than 10 % of images, beyond chance",
)
def check_zero(gradient: np.ndarray) -> Finding:
    """Look for zeros among L1 norms (n,); the margin does not saturate as cross-entropy does."""
    zero = share_of(int((gradient == 0).sum()), len(gradient))
    found = f"zero on {zero.count:g} of {plural(zero.total, 'image')}"
    return when(zero.low > 0.1, "masking"), found


@rule(
    "adaptive gradients there",
    "Do gradients of what the adaptive attacker sees reach the image?",
    "zero or NaN on less than 10 % of images, beyond chance",
)
def check_adaptive_gradient(gradient: np.ndarray) -> Finding:
    """Look for zeros and NaN among L1 norms (n,)."""
    useless = share_of(int((~(gradient > 0)).sum()), len(gradient))
    found = f"zero or NaN on {useless.count:g} of {plural(useless.total, 'image')}"
    return when(useless.low > 0.1, "failed"), found


@rule(
    "size of gradients",
    "Are gradients of a size that fits the logits?",
    f"a linear model would be fooled at an epsilon from {1 / RATIO_RANGE[1]:g} to "
    f"{1 / RATIO_RANGE[0]:g}",
)
def check_size(ratio: np.ndarray) -> Finding:
    """Check `ratio` (n,): the L1 norm of the margin's gradient over the margin."""
    median = float(np.median(ratio))
    plausible = RATIO_RANGE[0] <= median <= RATIO_RANGE[1]
    return when(not plausible, "masking"), f"at {1 / median:.2g} (median)"


@rule(
    "gradients point uphill",
    "Does a small step along the gradient raise the loss?",
    "on at least 75 % of images; a random direction does on about half",
)
def check_uphill(rises: np.ndarray, random: bool) -> Finding:
    """Check that a small step along its gradient raises an image's loss: `rises` is bool (n,).

    For a random model it is only a warning, as its loss differs from call to call.
    """
    up = share_of(int(rises.sum()), len(rises))
    return when(up.high < 0.75, "warning" if random else "masking"), f"on {percent(up.value)}"


def examine_gradients(results: Results, views: Views) -> Iterable[Check]:
    """Run the checks; those that need a gradient are not run where autograd could take none."""
    none = np.zeros(0)
    gradient, margin, rises = (
        results.clean.get(name, none) for name in ("gradient", "margin", "rises")
    )
    known = np.isfinite(gradient) & (gradient > 0) & (margin != 0)
    yield check_gradient_exists(views.differentiable, views.found is not None)
    yield check_optimises(views.optimises)
    yield check_finite(gradient)
    yield check_zero(gradient)
    yield check_adaptive_gradient(results.clean.get("adaptive_gradient", none))
    yield check_size(gradient[known] / np.abs(margin[known]))
    yield check_uphill(rises, views.random)
