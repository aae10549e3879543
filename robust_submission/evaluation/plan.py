"""Plans an evaluation: which attacks are run, by which attacker, within which radius."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from robust_submission.cli.errors import UserError, log
from robust_submission.evaluation.jobs import (
    ADAPTIVE,
    BLACK_BOX,
    CHOOSES_LOSS,
    ITERATIVE,
    RANDOM_AUTOATTACK,
    Attacker,
    Job,
    Plan,
)
from robust_submission.evaluation.views import Views
from robust_submission.settings import EvaluationSettings

EPSILONS = (0, 1 / 4, 1 / 2, 1, 2, 4)
"""Points of PGD's epsilon curve, in units of epsilon; `unbounded` is added as the last."""
CONTROL_EPSILONS = (0, 1 / 2, 1, 2)
"""The same where a minimum-norm attack measures the whole curve."""
OBLIVIOUS_EPSILONS = (0, 1, 4)
"""The same of the oblivious attacker."""
NEAREST_STEPS = 50
"""Steps of the minimum-norm attack, at least; twice as many find hardly anything nearer."""
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Points of the steps curve, as far as they are below the number of steps asked for."""


def plan_jobs(settings: EvaluationSettings, views: Views) -> Plan:
    """Plan the measurements and the curves.

    A model that autograd cannot differentiate is attacked with gradients only by attackers who see
    one, and with Square if there is no such attacker; in l1-dense, which Square does not know, with
    noise. Where gradients were found to need replacing, Square, which needs none, has a try at what
    withstands the others.

    Raises:
        UserError: an unknown attack, or one that refuses the norm.
    """
    attacks = settings.attacks
    queries = "noise" if settings.norm == "l1-dense" else "square"
    if not views.differentiable and views.found is None and queries not in attacks:
        attacks = (*attacks, queries)
        log.info("autograd cannot differentiate the model: %s is run too", queries)
    main = list[Job]()
    for epsilon in settings.epsilon:
        for attack in attacks:
            _check(_job(attack, Attacker.OBLIVIOUS, settings, epsilon, None, views))
            jobs = _by_each_attacker(attack, settings, epsilon, views)
            if not jobs:
                log.warning("%s needs a gradient and the model has none: not run", attack)
            main += jobs
        main += _controls(settings, epsilon, views)
        if _wants_square(attacks, settings.norm, views):
            square = _job("square", views.strongest, settings, epsilon, None, views)
            main.append(replace(square, on_survivors=True))
    main = list(dict.fromkeys(main))
    curve = _Curve(settings, views)
    drawn = [each for each in (Attacker.OBLIVIOUS, views.strongest) if views.has_gradient(each)]
    if not settings.curves:
        drawn = []
    pgd = None
    if views.has_gradient(views.strongest):
        pgd = curve.pgd(views.strongest, settings.epsilon[0], settings.steps)
    plan = Plan(
        main=main,
        epsilon_curves={attacker: curve.over_epsilon(attacker) for attacker in drawn},
        steps_curves={attacker: curve.over_steps(attacker) for attacker in drawn},
        nearest=None
        if views.random or views.strongest not in drawn
        else curve.nearest(views.strongest),
        same_as={},
        fixed=pgd if views.random and views.repeats else None,
        watched=pgd if settings.curves else None,
        planted=pgd if settings.curves and views.readouts and views.repeats else None,
    )
    same_as = {job: replace(job, attacker=Attacker.OBLIVIOUS, loss="ce") for job in plan.jobs}
    return replace(plan, same_as={j: o for j, o in same_as.items() if _gains_nothing(j, views)})


def planted_images(plan: Plan, passes: int, images: int, curve_images: int) -> int:
    """In how many images examples are planted, for `passes` each.

    Up to 100 of the curves' images, for at most a sixth of the passes that are planned, but at
    least 20 of them. Other attacks stop early where they can, so that of the passes that are made
    it is about a quarter. AutoAttack, whose passes depend on what survives, counts as one step.
    """
    if plan.planted is None:
        return 0
    work = sum(
        2 * (job.steps or 1) * (images if everywhere else curve_images)
        for job, everywhere in plan.distinct().items()
    )
    return min(max(work // (6 * passes), 20), 100, curve_images)


def _wants_square(attacks: Sequence[str], norm: str, views: Views) -> bool:
    """Whether gradients were replaced by a guess, and no attack does without them.

    Not of a random model: averaged over draws, Square would take too many passes.
    """
    guessed = views.found is not None and not views.random
    return guessed and norm != "l1-dense" and not {"square", "autoattack"} & set(attacks)


def _gains_nothing(job: Job, views: Views) -> bool:
    """Whether an adaptive attack finds exactly what the oblivious one does."""
    if job.attacker != Attacker.ADAPTIVE or views.random:
        return False
    same_view = views.seen_by[Attacker.ADAPTIVE] is views.model
    return job.attack in BLACK_BOX or (same_view and job.loss == "ce")


def _by_each_attacker(
    attack: str, settings: EvaluationSettings, epsilon: float, views: Views
) -> list[Job]:
    """One attack by each attacker that can make it."""
    if attack in BLACK_BOX:
        attackers = [Attacker.OBLIVIOUS, Attacker.ADAPTIVE]
    else:
        everyone = (Attacker.OBLIVIOUS, *ADAPTIVE)
        attackers = [each for each in everyone if views.has_gradient(each)]
    steps = settings.steps if attack in ITERATIVE else None
    return [_job(attack, each, settings, epsilon, steps, views) for each in attackers]


def _job(
    attack: str,
    attacker: Attacker,
    settings: EvaluationSettings,
    epsilon: float,
    steps: int | None,
    views: Views,
) -> Job:
    loss = views.loss(attacker) if attack in CHOOSES_LOSS else "ce"
    random_autoattack = attack == "autoattack" and views.random
    return Job(
        attack=RANDOM_AUTOATTACK if random_autoattack else attack,
        attacker=attacker,
        norm=settings.norm,
        epsilon=epsilon,
        steps=steps,
        loss=loss,
        on_survivors=random_autoattack,
    )


def _controls(settings: EvaluationSettings, epsilon: float, views: Views) -> list[Job]:
    """Random noise, and PGD transferred from the undefended twin."""
    noise = _job("noise", Attacker.OBLIVIOUS, settings, epsilon, None, views)
    if not views.has_gradient(Attacker.TRANSFER):
        if Attacker.TRANSFER in views.seen_by:
            log.warning("the model to transfer from has no gradient: no transfer attack")
        return [noise]
    return [noise, _job("pgd", Attacker.TRANSFER, settings, epsilon, settings.steps, views)]


def _check(job: Job) -> None:
    try:
        job.attacks(early_stop=False)
    except UserError as error:
        raise UserError(f"attacks: {job.attack}: {error}") from error


def unbounded(norm: str, image_size: int) -> float:
    """A radius within which every image can become mid-grey: no model can be right within it."""
    pixels = 3 * image_size**2
    return {"linf": 0.5, "l2": 0.5 * pixels**0.5}.get(norm, 0.5 * pixels)


@dataclass(frozen=True)
class _Curve:
    settings: EvaluationSettings
    views: Views

    def over_epsilon(self, attacker: Attacker) -> list[Job]:
        """PGD with growing epsilon; fewer points for the oblivious attacker, and as a control.

        On a masked model no attack succeeds and stops early: each of its points is expensive.
        """
        largest = unbounded(self.settings.norm, self.views.image_size)
        multiples = EPSILONS if self.views.random else CONTROL_EPSILONS
        if attacker == Attacker.OBLIVIOUS:
            multiples = OBLIVIOUS_EPSILONS
        radii = [self.settings.epsilon[0] * multiple for multiple in multiples]
        steps = self.settings.steps
        jobs = [self.pgd(attacker, each, steps) for each in radii if each < largest]
        # In L1 a step moves one value in a hundred.
        all_values = max(steps, 100) if self.settings.norm == "l1" else steps
        return [*jobs, self.pgd(attacker, largest, all_values)]

    def nearest(self, attacker: Attacker) -> Job:
        """The attack that finds how near an adversarial image is."""
        return Job(
            attack="ddn" if self.settings.norm == "l2" else "fmn",
            attacker=attacker,
            norm=self.settings.norm,
            epsilon=unbounded(self.settings.norm, self.views.image_size),
            steps=max(NEAREST_STEPS, self.settings.steps),
        )

    def over_steps(self, attacker: Attacker) -> list[Job]:
        """PGD with growing steps; if adaptive, the last has twice the steps asked for."""
        steps, epsilon = self.settings.steps, self.settings.epsilon[0]
        adaptive = attacker != Attacker.OBLIVIOUS
        points = [number for number in (STEPS if adaptive else (1, 5)) if number < steps]
        points += [steps, 2 * steps] if adaptive else [steps]
        return [self.pgd(attacker, epsilon, number) for number in points]

    def pgd(self, attacker: Attacker, epsilon: float, steps: int) -> Job:
        """PGD, on a random model with few draws."""
        job = _job("pgd", attacker, self.settings, epsilon, steps, self.views)
        return replace(job, few_draws=self.views.random)
