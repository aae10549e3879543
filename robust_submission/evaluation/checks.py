"""Signs that gradients are masked, or that an evaluation cannot be trusted.

Each check is a function of measurements alone. One that compares attacks does so image by image,
and speaks up only where chance is no explanation: an honest model evaluated on 100 images passes.
Sources: Athalye et al. 2018, Carlini et al. 2019, Tramèr et al. 2020, Croce & Hein 2020.
"""

from typing import Literal

import numpy as np
from scipy.stats import binomtest

from robust_submission.evaluation.schema import Check, Share, share
from robust_submission.evaluation.wording import chance as chance_level
from robust_submission.evaluation.wording import plural

Outcome = Literal["ok", "masking", "warning", "not run"]
CHANCE = 0.01
"""Largest probability, were there nothing to see, at which a difference counts."""
RATIO_RANGE = (0.1, 1e6)
"""What L1 norm of the margin's gradient over the margin can be. Its inverse is the L-infinity
epsilon at which a linear model would be fooled: beyond 10 the gradient has vanished, below 1e-6 it
has been blown up (with GCM about 1e-12), as pixels are 0 to 1 in steps of 1/255."""
_NOTHING = "no image to judge by"
_NO_GRADIENT = "no gradient to judge by"


def _check(name: str, question: str, expected: str, outcome: Outcome, found: str) -> Check:
    return Check(name=name, question=question, outcome=outcome, expected=expected, found=found)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def only_fooled_by(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Compare two attacks on the same images.

    Args:
        first: (n,), how much of each image survives the first attack: 0 or 1, or between them for
            a random model.
        second: The same of the second attack.

    Returns:
        The number of images that the first harms more, that the second harms more, and how likely
        the former would outnumber the latter so far by chance (sign test).
    """
    more, less = int((first < second).sum()), int((first > second).sum())
    if more + less == 0:
        return 0, 0, 1.0
    return more, less, float(binomtest(more, more + less, alternative="greater").pvalue)


def check_differentiable(differentiable: bool) -> Check:
    """Whether autograd can follow the outputs back to the images."""
    name, question = "differentiable", "Can autograd differentiate the model?"
    outcome: Outcome = "ok" if differentiable else "warning"
    found = "it can" if differentiable else "it cannot: no attack followed the model's own gradient"
    return _check(name, question, "it can", outcome, found)


def check_finite(gradient: np.ndarray) -> Check:
    """`gradient` (n,): NaN where an image's gradient was not finite."""
    name, question = "finite gradients", "Is every gradient a finite number?"
    if len(gradient) == 0:
        return _check(name, question, "no NaN", "not run", _NO_GRADIENT)
    bad = int(np.isnan(gradient).sum())
    outcome: Outcome = "masking" if bad else "ok"
    return _check(name, question, "no NaN", outcome, f"NaN or infinite on {plural(bad, 'image')}")


def check_zero(gradient: np.ndarray) -> Check:
    """`gradient` (n,): L1 norms; the margin's, which does not saturate as cross-entropy does."""
    name, question = "gradients there", "Do gradients reach the image?"
    expected = "zero on less than 10 % of images, beyond chance"
    if len(gradient) == 0:
        return _check(name, question, expected, "not run", _NO_GRADIENT)
    zero = share(int((gradient == 0).sum()), len(gradient))
    outcome: Outcome = "masking" if zero.low > 0.1 else "ok"
    found = f"zero on {zero.count:g} of {plural(zero.total, 'image')}"
    return _check(name, question, expected, outcome, found)


def check_size(gradient: np.ndarray, margin: np.ndarray) -> Check:
    """`gradient` (n,): L1 norms of the margin's gradient; `margin` (n,)."""
    name, question = "size of gradients", "Are gradients of a size that fits the logits?"
    low, high = RATIO_RANGE
    expected = f"a linear model would be fooled at an epsilon from {1 / high:g} to {1 / low:g}"
    known = np.isfinite(gradient) & (gradient > 0) & (margin != 0)
    if not known.any():
        return _check(name, question, expected, "not run", _NO_GRADIENT)
    ratio = float(np.median(gradient[known] / np.abs(margin[known])))
    outcome: Outcome = "ok" if low <= ratio <= high else "masking"
    return _check(name, question, expected, outcome, f"at {1 / ratio:.2g} (median)")


def check_uphill(rises: np.ndarray, random: bool) -> Check:
    """`rises` bool (n,): whether a small step along its gradient raised an image's loss."""
    name = "gradients point uphill"
    question = "Does a small step along the gradient raise the loss?"
    expected = "on 75 % of images at least; a random direction does on about half"
    if len(rises) == 0:
        return _check(name, question, expected, "not run", _NO_GRADIENT)
    up = share(int(rises.sum()), len(rises))
    sign: Outcome = "warning" if random else "masking"  # its loss differs from call to call
    outcome: Outcome = sign if up.high < 0.75 else "ok"
    return _check(name, question, expected, outcome, f"on {_percent(up.value)}")


def check_outputs(softmax: bool) -> Check:
    """Whether the outputs are probabilities."""
    name, question = "logits", "Does the model give logits?"
    outcome: Outcome = "warning" if softmax else "ok"
    found = "probabilities, whose gradients vanish; the adaptive attacks saw their logarithms"
    return _check(name, question, "logits", outcome, found if softmax else "logits")


def check_random(random: bool, draws: int, eot: int) -> Check:
    """Whether two calls differ."""
    name, question = "deterministic", "Does the model answer the same twice?"
    outcome: Outcome = "warning" if random else "ok"
    found = f"it is random: adaptive attacks average {eot} draws, {draws} other draws are scored"
    return _check(name, question, "the same twice", outcome, found if random else "the same twice")


def check_one_step(one: np.ndarray, many: np.ndarray, view: str) -> Check:
    """Survival (n,) of attacks of one step, and of those of many."""
    name, question = f"many steps beat one, {view}", "Do many steps fool what one step fools?"
    expected = "many at least as strong as one, within chance"
    if len(one) == 0:
        return _check(name, question, expected, "not run", _NOTHING)
    more, less, chance = only_fooled_by(one, many)
    outcome: Outcome = "masking" if chance < CHANCE else "ok"
    found = f"only one step fools {plural(more, 'image')}, only many fool {less}"
    return _check(name, question, expected, outcome, found)


def check_black_box(black: np.ndarray, white: np.ndarray, attack: str) -> Check:
    """Survival (n,) of an attack without the model's gradients, and of the gradient attacks."""
    name = f"white box beats {attack}"
    question = f"Do gradients through the model as it is find what {attack} finds without them?"
    expected = f"{attack} alone fools no more than 2 % of images, beyond chance"
    if len(black) == 0:
        return _check(name, question, expected, "not run", _NOTHING)
    alone = share(int((white - black >= 0.5).sum()), len(black))
    outcome: Outcome = "masking" if alone.low > 0.02 else "ok"
    found = f"{attack} alone fools {alone.count:g} of {plural(alone.total, 'image')}"
    return _check(name, question, expected, outcome, found)


def check_gap(oblivious: np.ndarray, adaptive: np.ndarray) -> Check:
    """Survival (n,) of the same attacks through the model as it is, and revealed."""
    name = "oblivious and adaptive agree"
    question = "Do the same attacks find as much when the defence is known?"
    expected = "as many images survive, within chance or one point"
    if len(oblivious) == 0:
        return _check(name, question, expected, "not run", _NOTHING)
    gap = float(oblivious.mean() - adaptive.mean())
    _, _, chance = only_fooled_by(adaptive, oblivious)
    outcome: Outcome = "masking" if gap > 0.01 and chance < CHANCE else "ok"
    found = f"{_percent(oblivious.mean())} survive unknowing attacks, {_percent(adaptive.mean())} "
    return _check(name, question, expected, outcome, f"{found}knowing ones")


def check_large_epsilon(accuracy: Share, epsilon: float, classes: int, view: str) -> Check:
    """Accuracy within a radius at which every image can be made the same grey."""
    name = f"large epsilon, {view}"
    question = "Does an attack without bounds succeed?"
    expected = f"accuracy at most {chance_level(classes)} (chance) at epsilon {epsilon:g}"
    if accuracy.total == 0:
        return _check(name, question, expected, "not run", _NOTHING)
    outcome: Outcome = "masking" if accuracy.low > 1 / classes else "ok"
    return _check(name, question, expected, outcome, _percent(accuracy.value))


def check_converged(once: np.ndarray, twice: np.ndarray, steps: int) -> Check:
    """Survival (n,) of adaptive PGD, and of the same with twice the steps."""
    name, question = "converged", "Do twice the steps change little?"
    expected = f"{2 * steps} steps find as much as {steps}, within chance or two points"
    if len(once) == 0:
        return _check(name, question, expected, "not run", _NOTHING)
    gain = float(once.mean() - twice.mean())
    _, _, chance = only_fooled_by(twice, once)
    outcome: Outcome = "warning" if gain > 0.02 and chance < CHANCE else "ok"
    found = f"{_percent(once.mean())} survive {steps} steps, {_percent(twice.mean())} {2 * steps}"
    return _check(name, question, expected, outcome, found)


def check_epsilon_zero(clean: np.ndarray, attacked: np.ndarray) -> Check:
    """Predictions of clean images, and of the same attacked at epsilon 0."""
    name, question = "epsilon 0", "Is an attack at epsilon 0 no attack?"
    changed = int((clean != attacked).sum())
    outcome: Outcome = "warning" if changed else "ok"
    found = f"{changed} of {clean.size} predictions differ"
    return _check(name, question, "the clean predictions, each of them", outcome, found)


def check_ball(distances: np.ndarray, epsilons: np.ndarray) -> Check:
    """Largest distances from the clean images, and the radii they were to keep to."""
    name, question = "inside the ball", "Did every attack keep to its epsilon?"
    outside = int((distances > epsilons * (1 + 1e-4) + 1e-6).sum())
    outcome: Outcome = "warning" if outside else "ok"
    return _check(name, question, "all of them", outcome, f"{outside} of {len(epsilons)} did not")


def check_clean(clean: Share, classes: int) -> Check:
    """Clean accuracy: at chance, range, normalisation or class order are wrong."""
    name, question = "clean accuracy", "Does the model know these images?"
    outcome: Outcome = "ok" if clean.low > 1 / classes else "warning"
    found = _percent(clean.value)
    if outcome == "warning":
        found += "; is its input RGB from 0 to 1, its normalisation inside, its class order ours?"
    return _check(name, question, f"better than chance, {chance_level(classes)}", outcome, found)
