"""Plans what evaluate.py runs: attacks at an epsilon, each by one attacker."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from robust_submission.attacks import PGD, Attack, AutoAttack, build_attack
from robust_submission.cli.errors import UserError
from robust_submission.evaluation import wording
from robust_submission.evaluation.schema import Attacker
from robust_submission.evaluation.views import Target

BLACK_BOX = ("noise", "square")
EPSILONS = (0, 1 / 4, 1 / 2, 1, 2, 4)
"""Points of the curve, in units of epsilon; one at which no image can be told closes it."""
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_ITERATIVE = ("bim", "mim", "pgd")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attack on all images, or on those of the curves."""

    attack: str
    """A name of `attacks.ATTACKS`."""
    attacker: Attacker
    norm: str
    epsilon: float
    steps: int | None = None
    """Of the attacks that --steps sets; None for the others."""

    @property
    def label(self) -> str:
        return self.attack if self.steps is None else f"{self.attack}-{self.steps}"

    @property
    def name(self) -> str:
        size = wording.radius(self.epsilon, self.norm)
        return f"{self.label} {self.norm} {size} {self.attacker}"

    @property
    def key(self) -> str:
        """A file name that no other job has."""
        text = json.dumps([self.attack, self.attacker, self.norm, self.epsilon.hex(), self.steps])
        return f"{self.label}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The attacks it is made of, to be run in turn on the survivors."""
        return AutoAttack.STANDARD if self.attack == "autoattack" else (self.attack,)

    def attacks(self, early_stop: bool) -> Mapping[str, Attack]:
        """Its parts.

        Args:
            early_stop: Leave out what cannot change who is fooled, where the attack can.

        Raises:
            UserError: there is no such attack, or it refuses norm or epsilon.
        """
        options: dict[str, Any] = {} if self.steps is None else {"steps": self.steps}
        if early_stop and self.attack in _ITERATIVE:
            options["early_stop"] = True
        return {name: build_attack(name, self.epsilon, self.norm, **options) for name in self.parts}

    def settings(self, early_stop: bool) -> dict[str, Any]:
        """Everything that repeats the attack."""
        (first, *others) = self.attacks(early_stop).values()
        settings = asdict(first)  # pyright: ignore[reportArgumentType]
        if isinstance(first, PGD) and first.step_size is None:
            settings["step_size"] = first.stride * self.epsilon / max(first.steps, 1)
        if others:
            settings["attacks"] = AutoAttack.STANDARD
        return settings


def unbounded(norm: str, image_size: int) -> float:
    """A radius that reaches mid-grey from any image: no model can tell classes within it."""
    pixels = 3 * image_size**2
    return {"linf": 0.5, "l2": 0.5 * pixels**0.5}.get(norm, 0.5 * pixels)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All jobs of an evaluation."""

    main: list[Job]
    """On all images, those of the first (the headline's) epsilon first."""
    epsilon_curves: dict[Attacker, list[Job]]
    steps_curves: dict[Attacker, list[Job]]

    def distinct(self, target: Target) -> dict[Job, bool]:
        """What must be run, each with whether it is for all images or those of the curves."""
        curves = [*self.epsilon_curves.values(), *self.steps_curves.values()]
        jobs = {canonical(job, target): False for curve in curves for job in curve}
        main = {canonical(job, target): True for job in self.main}
        return main | {job: False for job in jobs if job not in main}


def canonical(job: Job, target: Target) -> Job:
    """The job whose results are this one's: adaptive attacks on a model that hides nothing."""
    same_outputs = job.attack in BLACK_BOX and not target.random
    if job.attacker == Attacker.ADAPTIVE and (not target.hides or same_outputs):
        return replace(job, attacker=Attacker.OBLIVIOUS)
    return job


def plan_jobs(
    attacks: tuple[str, ...],
    norm: str,
    epsilons: tuple[float, ...],
    steps: int,
    target: Target,
    curves: bool,
) -> Plan:
    """Plan the measurements and the curves.

    Raises:
        UserError: an unknown attack, one that refuses the norm, or one that needs gradients of a
            model that has none.
    """
    main = list[Job]()
    everywhere: tuple[Attacker, ...] = (Attacker.OBLIVIOUS, Attacker.ADAPTIVE)
    for epsilon in epsilons:
        for attack in dict.fromkeys(attacks):
            number = steps if attack in _ITERATIVE else None
            guided = target.bypassed is not None and attack not in BLACK_BOX
            for attacker in (*everywhere, Attacker.ADAPTIVE_BPDA) if guided else everywhere:
                job = Job(
                    attack=attack, attacker=attacker, norm=norm, epsilon=epsilon, steps=number
                )
                main.append(job)
        main += _controls(norm, epsilon, steps, target)
    for job in main:
        try:
            job.attacks(early_stop=False)
        except ValueError as error:
            raise UserError(f"--attacks {job.attack}: {error}") from error
        if (
            not target.differentiable
            and job.attack not in BLACK_BOX
            and job.attacker != Attacker.TRANSFER
        ):
            raise UserError(
                f"--attacks {job.attack}: expected a model that autograd can differentiate, found "
                "one that it cannot; attack it with square and --twin."
            )
    if not curves or not target.differentiable:
        return Plan(main=list(dict.fromkeys(main)), epsilon_curves={}, steps_curves={})
    curve = _Curve(norm, epsilons[0], steps, target.image_size)
    return Plan(
        main=list(dict.fromkeys(main)),
        epsilon_curves={attacker: curve.over_epsilon(attacker) for attacker in everywhere},
        steps_curves={attacker: curve.over_steps(attacker) for attacker in everywhere},
    )


def _controls(norm: str, epsilon: float, steps: int, target: Target) -> list[Job]:
    """Random noise, and PGD from the undefended twin."""
    jobs = [Job(attack="noise", attacker=Attacker.OBLIVIOUS, norm=norm, epsilon=epsilon)]
    if target.twin is not None:
        jobs.append(
            Job(attack="pgd", attacker=Attacker.TRANSFER, norm=norm, epsilon=epsilon, steps=steps)
        )
    return jobs


@dataclass(frozen=True)
class _Curve:
    norm: str
    epsilon: float
    steps: int
    image_size: int

    def over_epsilon(self, attacker: Attacker) -> list[Job]:
        """PGD at growing epsilon; fewer points where a masked model makes each one dear."""
        largest = unbounded(self.norm, self.image_size)
        multiples = [m for m in EPSILONS if attacker == Attacker.ADAPTIVE or m in (0, 1, 4)]
        radii = [self.epsilon * m for m in multiples if self.epsilon * m < largest]
        return [self._pgd(attacker, radius, self.steps) for radius in [*radii, largest]]

    def over_steps(self, attacker: Attacker) -> list[Job]:
        """PGD with growing steps, at last with twice those asked for where it is adaptive."""
        grid = [1, 5] if attacker == Attacker.OBLIVIOUS else list(STEPS)
        points = [number for number in grid if number < self.steps] + [self.steps]
        points += [2 * self.steps] if attacker == Attacker.ADAPTIVE else []
        return [self._pgd(attacker, self.epsilon, number) for number in points]

    def _pgd(self, attacker: Attacker, epsilon: float, steps: int) -> Job:
        return Job(attack="pgd", attacker=attacker, norm=self.norm, epsilon=epsilon, steps=steps)
