"""Plans an evaluation: which attacks are run, by which attacker, within which radius."""

from dataclasses import dataclass, replace

from robust_submission.cli.errors import UserError
from robust_submission.evaluation.jobs import (
    BLACK_BOX,
    ITERATIVE,
    Attacker,
    EvaluationSettings,
    Job,
    Plan,
)
from robust_submission.evaluation.views import Views

EPSILONS = (0, 1 / 4, 1 / 2, 1, 2, 4)
"""Points of the epsilon curve, in units of epsilon; `unbounded` is added as the last."""
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Points of the steps curve, as far as they are below the number of steps asked for."""


def plan_jobs(settings: EvaluationSettings, views: Views) -> Plan:
    """Plan the measurements and the curves.

    Raises:
        UserError: an unknown attack, one that refuses the norm, or one that needs gradients of a
            model that has none.
    """
    main = list[Job]()
    for epsilon in settings.epsilon:
        main += _attacks(settings, epsilon, views) + _controls(settings, epsilon, views)
    main = list(dict.fromkeys(main))
    for job in main:
        _check(job, views)
    attackers = (Attacker.OBLIVIOUS, Attacker.ADAPTIVE)
    curve = _Curve(settings, views.image_size)
    drawn = attackers if settings.curves and views.differentiable else ()
    plan = Plan(
        main=main,
        epsilon_curves={attacker: curve.over_epsilon(attacker) for attacker in drawn},
        steps_curves={attacker: curve.over_steps(attacker) for attacker in drawn},
        same_as={},
    )
    same_as = {job: replace(job, attacker=Attacker.OBLIVIOUS) for job in plan.jobs}
    return replace(plan, same_as={j: o for j, o in same_as.items() if _gains_nothing(j, views)})


def _gains_nothing(job: Job, views: Views) -> bool:
    """Whether an adaptive attack finds exactly what the oblivious one does."""
    outputs_only = job.attack in BLACK_BOX and not views.random
    return job.attacker == Attacker.ADAPTIVE and (not views.hides or outputs_only)


def _attacks(settings: EvaluationSettings, epsilon: float, views: Views) -> list[Job]:
    """Every attack by each attacker."""
    jobs = list[Job]()
    for attack in settings.attacks:
        attackers = [Attacker.OBLIVIOUS, Attacker.ADAPTIVE]
        if Attacker.ADAPTIVE_BPDA in views.seen_by and attack not in BLACK_BOX:
            attackers.append(Attacker.ADAPTIVE_BPDA)
        steps = settings.steps if attack in ITERATIVE else None
        jobs += [
            Job(attack=attack, attacker=each, norm=settings.norm, epsilon=epsilon, steps=steps)
            for each in attackers
        ]
    return jobs


def _controls(settings: EvaluationSettings, epsilon: float, views: Views) -> list[Job]:
    """Random noise, and PGD transferred from the undefended twin."""
    norm, steps = settings.norm, settings.steps
    noise = Job(attack="noise", attacker=Attacker.OBLIVIOUS, norm=norm, epsilon=epsilon)
    if Attacker.TRANSFER not in views.seen_by:
        return [noise]
    transfer = Attacker.TRANSFER
    return [noise, Job(attack="pgd", attacker=transfer, norm=norm, epsilon=epsilon, steps=steps)]


def _check(job: Job, views: Views) -> None:
    try:
        job.attacks(early_stop=False)
    except UserError as error:
        raise UserError(f"attacks: {job.attack}: {error}") from error
    without_gradient = job.attack in BLACK_BOX or job.attacker == Attacker.TRANSFER
    if not views.differentiable and not without_gradient:
        raise UserError(
            f"attacks: {job.attack}: expected a model that autograd can differentiate, found one "
            "that it cannot; use square, and a twin to transfer from."
        )


def unbounded(norm: str, image_size: int) -> float:
    """A radius within which every image can become mid-grey: no model can be right within it."""
    pixels = 3 * image_size**2
    return {"linf": 0.5, "l2": 0.5 * pixels**0.5}.get(norm, 0.5 * pixels)


@dataclass(frozen=True)
class _Curve:
    settings: EvaluationSettings
    image_size: int

    def over_epsilon(self, attacker: Attacker) -> list[Job]:
        """PGD with growing epsilon; fewer points for the oblivious attacker.

        On a masked model no attack succeeds and stops early: each of its points is expensive.
        """
        largest = unbounded(self.settings.norm, self.image_size)
        multiples = EPSILONS if attacker == Attacker.ADAPTIVE else (0, 1, 4)
        radii = [self.settings.epsilon[0] * multiple for multiple in multiples]
        radii = [*(each for each in radii if each < largest), largest]
        return [self._pgd(attacker, each, self.settings.steps) for each in radii]

    def over_steps(self, attacker: Attacker) -> list[Job]:
        """PGD with growing steps; if adaptive, the last has twice the steps asked for."""
        steps, epsilon = self.settings.steps, self.settings.epsilon[0]
        adaptive = attacker == Attacker.ADAPTIVE
        points = [number for number in (STEPS if adaptive else (1, 5)) if number < steps]
        points += [steps, 2 * steps] if adaptive else [steps]
        return [self._pgd(attacker, epsilon, number) for number in points]

    def _pgd(self, attacker: Attacker, epsilon: float, steps: int) -> Job:
        norm = self.settings.norm
        return Job(attack="pgd", attacker=attacker, norm=norm, epsilon=epsilon, steps=steps)
