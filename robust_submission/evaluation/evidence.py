"""Which comparisons the checks are given."""

from collections.abc import Iterable

import numpy as np

from robust_submission.attacks import AutoAttack
from robust_submission.evaluation import checks
from robust_submission.evaluation.plan import BLACK_BOX, Job
from robust_submission.evaluation.results import Findings, accuracy
from robust_submission.evaluation.schema import ADAPTIVE, Attacker, Check

SINGLE_STEP = ("fgsm", "ffgsm")


def run_checks(findings: Findings) -> list[Check]:
    """Every check that the measurements allow."""
    measure, target = findings.measure, findings.measure.target
    main = findings.plan.main
    distances = np.array([findings.arrays(job)["distance"].max(initial=0) for job in main])
    return [
        *_comparisons(findings),
        *_gradient_checks(findings),
        *_curve_checks(findings),
        checks.check_outputs(target.softmax),
        checks.check_random(target.random, measure.draws, measure.eot),
        checks.check_ball(distances, np.array([job.epsilon for job in main])),
        checks.check_clean(accuracy(findings.clean), target.num_classes),
    ]


def _comparisons(findings: Findings) -> Iterable[Check]:
    """Attacks against each other, on the images that are right when clean."""
    survival, worst = findings.survival, findings.worst
    model = [job for job in findings.headline(Attacker.OBLIVIOUS) if job.attack not in BLACK_BOX]
    revealed = [job for job in findings.headline(*ADAPTIVE) if job.attack not in BLACK_BOX]
    if model:
        yield checks.check_gap(survival(worst(model)), survival(worst(revealed)))
    white = [job for job in model if job.attack not in SINGLE_STEP]
    if white:
        gradients = np.logical_and.reduce([_without_square(findings, job) for job in white])
        for name, robust in _black_boxes(findings):
            yield checks.check_black_box(survival(robust), survival(gradients), name)
    for attacker, jobs in ((Attacker.OBLIVIOUS, model), (Attacker.ADAPTIVE, revealed)):
        one = [job for job in jobs if job.attack in SINGLE_STEP]
        many = [job for job in jobs if job.attack not in SINGLE_STEP]
        if one and many and (attacker == Attacker.OBLIVIOUS or findings.measure.target.hides):
            yield checks.check_one_step(survival(worst(one)), survival(worst(many)), attacker)


def _without_square(findings: Findings, job: Job) -> np.ndarray:
    """`robust`, with what only the Square part of AutoAttack fooled still standing."""
    by_square = findings.arrays(job)["fooled_by"] == AutoAttack.STANDARD.index("square")
    return findings.robust(job) | (findings.clean & by_square[:, None])


def _black_boxes(findings: Findings) -> Iterable[tuple[str, np.ndarray]]:
    """Attacks that need no gradient of the model as it is, with what withstands them."""
    for job in findings.headline(Attacker.OBLIVIOUS, Attacker.TRANSFER):
        if job.attack in BLACK_BOX:
            yield job.attack, findings.robust(job)
        elif job.attacker == Attacker.TRANSFER:
            yield "transfer", findings.robust(job)
        elif job.attack == "autoattack":
            by_square = findings.arrays(job)["fooled_by"] == AutoAttack.STANDARD.index("square")
            yield "square (AutoAttack)", findings.clean & ~by_square[:, None]


def _gradient_checks(findings: Findings) -> Iterable[Check]:
    """The gradients at the clean images; none are there where autograd could take none."""
    clean, target, none = findings.results.clean, findings.measure.target, np.zeros(0)
    gradient = clean.get("gradient", none)
    yield checks.check_differentiable(target.differentiable)
    yield checks.check_finite(gradient)
    yield checks.check_zero(gradient)
    yield checks.check_size(gradient, clean.get("margin", none))
    yield checks.check_uphill(clean.get("rises", none), target.random)


def _curve_checks(findings: Findings) -> Iterable[Check]:
    target = findings.measure.target
    for attacker, jobs in findings.plan.epsilon_curves.items():
        if attacker == Attacker.ADAPTIVE and not target.hides:
            continue
        last = accuracy(findings.on_curve(jobs[-1]))
        yield checks.check_large_epsilon(last, jobs[-1].epsilon, target.num_classes, attacker)
    if jobs := findings.plan.epsilon_curves.get(Attacker.OBLIVIOUS):
        predictions = findings.arrays(jobs[0])["predictions"]
        clean = findings.results.clean["predictions"][: len(predictions)]
        yield checks.check_epsilon_zero(clean, predictions)
    if jobs := findings.plan.steps_curves.get(Attacker.ADAPTIVE):
        once, twice = (findings.survival(findings.on_curve(job)) for job in jobs[-2:])
        yield checks.check_converged(once, twice, jobs[-2].steps or 0)
