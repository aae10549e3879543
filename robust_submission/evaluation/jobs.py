"""Who attacks, and with what: the jobs that make up an evaluation."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from robust_submission.attacks import PGD, AutoAttack, BallAttack, build_attack
from robust_submission.cli.numbers import radius

BLACK_BOX = ("noise", "square")
"""Attacks that use no gradient."""
SINGLE_STEP = ("fgsm", "ffgsm")
ITERATIVE = ("bim", "mim", "pgd")
"""Attacks whose number of steps the user sets."""
CHOOSES_LOSS = (*SINGLE_STEP, *ITERATIVE)
"""Attacks that maximise a loss which can be chosen."""
QUERIES_ON_SURVIVORS = 500
"""Of Square where it was not asked for: about as many passes as the other attacks make."""
RANDOM_AUTOATTACK = "autoattack-rand"
"""AutoAttack on a random model: its authors' "rand" version, after all other attacks."""


class Attacker(StrEnum):
    """Who attacks: what the attacker knows of the defence, and so differentiates.

    Every attack is scored on the model as it is deployed.
    """

    OBLIVIOUS = "oblivious"
    """Knows of no defence and differentiates the model as it is."""
    ADAPTIVE = "adaptive"
    """Knows the defence and differentiates the model with its masking revealed: GCM by BPDA, TRN
    through its gradient map, random stages by their expectation."""
    ADAPTIVE_BPDA = "adaptive-bpda"
    """The same, but passes the gradient straight through TRN as well, and through whatever else in
    the model has no gradient that follows its values (see `models.bpda`)."""
    TRANSFER = "transfer"
    """Differentiates the undefended twin."""


ADAPTIVE = (Attacker.ADAPTIVE, Attacker.ADAPTIVE_BPDA)
"""The attackers that know the defence."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attack by one attacker, on all images or on those of the curves."""

    attack: str
    """A name of `attacks.ATTACKS`, or `RANDOM_AUTOATTACK`."""
    attacker: Attacker
    norm: str
    epsilon: float
    steps: int | None = None
    """Of `ITERATIVE` attacks; None for the others."""
    loss: str = "ce"
    """What `CHOOSES_LOSS` attacks maximise, of `attacks.LOSSES`."""
    few_draws: bool = False
    """On a curve of a random model: fewer draws are averaged, and one is scored."""
    on_survivors: bool = False
    """Runs after the others, and leaves out images that one which it `follows` fools in every
    scored draw; these it takes over."""

    @property
    def label(self) -> str:
        """The attack with its steps, such as "pgd-20"."""
        return self.attack if self.steps is None else f"{self.attack}-{self.steps}"

    @property
    def name(self) -> str:
        """The name in reports and tables, such as "pgd-20 linf 8/255 adaptive"."""
        return f"{self.label} {self.norm} {radius(self.epsilon, self.norm)} {self.attacker}"

    @property
    def key(self) -> str:
        """A file name that no other job has."""
        text = json.dumps(asdict(self) | {"epsilon": self.epsilon.hex()}, sort_keys=True)
        return f"{self.label}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The attacks it consists of; each is run on the images that withstood those before."""
        several = {"autoattack": AutoAttack.STANDARD, RANDOM_AUTOATTACK: AutoAttack.RANDOM}
        return several.get(self.attack, (self.attack,))

    @property
    def compares(self) -> bool:
        """Whether attacks are compared image by image while it runs."""
        return self.on_survivors or len(self.parts) > 1

    def follows(self, other: "Job") -> bool:
        """Whether it can take over the other job's adversarial images: of a ball and an attacker
        whose images its own attacker knows.

        Not those of weaker kinds of attack: checks ask whether the stronger find them as well.
        """
        known = (self.attacker, *([Attacker.OBLIVIOUS] if self.attacker in ADAPTIVE else []))
        same = (self.norm, self.epsilon) == (other.norm, other.epsilon)
        weaker = other.attack in (*BLACK_BOX, *SINGLE_STEP)
        return same and other.attacker in known and not (other.few_draws or weaker)

    def attacks(self, early_stop: bool) -> Mapping[str, BallAttack]:
        """Build its parts.

        Args:
            early_stop: Skip steps that cannot change which images are fooled, where the attack
                supports it.

        Raises:
            UserError: there is no such attack, or it refuses norm or epsilon.
        """
        options: dict[str, Any] = {} if self.steps is None else {"steps": self.steps}
        if early_stop and self.attack in (*ITERATIVE, "screen"):
            options["early_stop"] = True
        if self.attack in CHOOSES_LOSS:
            options["loss"] = self.loss
        if self.attack == "square" and self.on_survivors:
            options["queries"] = QUERIES_ON_SURVIVORS
        return {name: build_attack(name, self.epsilon, self.norm, **options) for name in self.parts}

    def settings(self, early_stop: bool) -> dict[str, Any]:
        """Everything that is needed to repeat the attack."""
        (first, *others) = self.attacks(early_stop).values()
        settings = asdict(first)  # pyright: ignore[reportArgumentType]
        settings.pop("observe", None)
        if isinstance(first, PGD) and first.step_size is None:
            settings["step_size"] = first.stride * self.epsilon / max(first.steps, 1)
        if others:
            settings["attacks"] = self.parts
        return settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All jobs of an evaluation."""

    main: list[Job]
    """Jobs on all images; those with the first epsilon, the headline's, come first."""
    epsilon_curves: dict[Attacker, list[Job]]
    """PGD with growing epsilon, on the images of the curves; the last is unbounded."""
    steps_curves: dict[Attacker, list[Job]]
    """PGD with growing steps, on the images of the curves."""
    nearest: Job | None = None
    """The minimum-norm attack of the strongest adaptive attacker, on the images of the curves; None
    without curves, and for a random model, of which one draw's distance means nothing."""
    same_as: dict[Job, Job]
    """Jobs that need no run, each with the job that has the same results."""
    fixed: Job | None = None
    """PGD on a random model whose randomness is held fixed; None for a deterministic one, and where
    it cannot be held."""
    watched: Job | None = None
    """PGD whose steps are examined, on the images of the curves; None without curves."""
    planted: Job | None = None
    """PGD that must find planted examples; None where none can be planted."""

    @property
    def jobs(self) -> list[Job]:
        """Every job, those on all images first; one may occur twice."""
        curves = [*self.epsilon_curves.values(), *self.steps_curves.values()]
        nearest = [] if self.nearest is None else [self.nearest]
        return [*self.main, *(job for curve in curves for job in curve), *nearest]

    @property
    def screened(self) -> bool:
        """Whether the screen stands in for AutoAttack, which is not run."""
        attacks = {job.attack for job in self.main}
        return "screen" in attacks and not attacks & {"autoattack", RANDOM_AUTOATTACK}

    def distinct(self) -> dict[Job, bool]:
        """The jobs to run, each with whether it is on all images or on those of the curves."""
        runs = [self.same_as.get(job, job) for job in self.jobs]
        everywhere = set(runs[: len(self.main)])
        return {job: job in everywhere for job in runs}

    def headline_runs(self) -> frozenset[Job]:
        """The jobs to run for the headline numbers."""
        return frozenset(self.same_as.get(job, job) for job in self.headline(*Attacker))

    def headline(self, *attackers: Attacker) -> list[Job]:
        """The jobs of these attackers on all images with the first epsilon."""
        epsilon = self.main[0].epsilon
        return [job for job in self.main if job.epsilon == epsilon and job.attacker in attackers]
