"""Which image meets which attack in which draw, and whether the model withstood it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_submission.attacks import WorstCase, build_attack, image_seeds
from robust_submission.attacks.base import Attack, Model, correct
from robust_submission.cli.errors import UserError
from robust_submission.data.corruptions import CORRUPTIONS, Corruption
from robust_submission.leaderboard.load import Contestant

SEEING = ("fgsm", "ffgsm", "bim", "mim", "pgd")
PARTS = ("clean", "corrupted", "black_box", "white_box")
COLUMNS = (*PARTS, "adaptive")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the attackers do."""

    severities: Sequence[int]
    black_box: Sequence[str]
    white_box: Sequence[str]
    epsilon: Sequence[float]
    steps: int
    queries: int
    seed: int

    def __post_init__(self) -> None:
        for field, known in (("black_box", ("transfer", "square")), ("white_box", SEEING)):
            if unknown := set(getattr(self, field)) - set(known):
                names = ", ".join(known)
                raise UserError(f"--{field}: expected {names}, found {sorted(unknown)[0]}.")
        for field in ("black_box", "white_box", "epsilon", "severities"):
            if not getattr(self, field):
                raise UserError(f"--{field}: expected at least one, found none.")
        if unknown := set(self.severities) - set(range(1, 6)):
            raise UserError(f"--severities: expected 1 to 5, found {sorted(unknown)[0]}.")


@dataclass(frozen=True)
class _Transfer:
    """An attack that looks at the twin, whatever model it is given."""

    attack: Attack
    twin: Model

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        return self.attack(self.twin, images, labels, generator, seeds=seeds)


class Scorer:
    """Judges batches of images of one contestant."""

    def __init__(self, contestant: Contestant, setting: Setting) -> None:
        self.contestant, self.setting = contestant, setting
        self.black_box = [
            name for name in setting.black_box if name == "square" or contestant.twin is not None
        ]

    @property
    def columns(self) -> tuple[str, ...]:
        """What is measured in every draw."""
        return COLUMNS if self.black_box else ("clean", "corrupted", "white_box", "adaptive")

    def judge(
        self, column: str, draw: int, images: Tensor, labels: Tensor, indices: Tensor
    ) -> Tensor:
        """Which images are answered rightly, (B,) bool."""
        if column == "clean":
            return self._right(images, labels)
        choices = self._choices(column)
        part = "white_box" if column == "adaptive" else column  # the same attacks, image by image
        drawn = self._draw(PARTS.index(part), draw, indices.tolist(), len(choices))
        seeds = image_seeds(1000 * self.setting.seed + draw, indices)
        changed = images.clone()
        for choice in np.unique(drawn):
            rows = torch.from_numpy(np.flatnonzero(drawn == choice))
            act = choices[choice]
            changed[rows] = act(images[rows], labels[rows], seeds[rows])
        return self._right(changed, labels)

    def _right(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return correct(self.contestant.model(images), labels)

    def _draw(self, part: int, draw: int, indices: list[int], count: int) -> np.ndarray:
        """Which choice each image meets: a function of seed, draw, part and image alone."""
        keys = [[self.setting.seed, draw, part, index] for index in indices]
        return np.array([np.random.default_rng(key).integers(count) for key in keys])

    def _choices(self, column: str) -> list[Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """What may happen to an image, each with the same chance."""
        if column == "corrupted":
            kinds = [
                Corruption(name=name, severity=severity)
                for name in CORRUPTIONS
                for severity in self.setting.severities
            ]
            return [lambda x, _, s, corruption=each: corruption.batch(x, s) for each in kinds]
        names = self.black_box if column == "black_box" else self.setting.white_box
        pairs = [(name, epsilon) for name in names for epsilon in self.setting.epsilon]
        return [
            lambda x, y, s, name=name, epsilon=epsilon: self._attack(column, name, epsilon, x, y, s)
            for name, epsilon in pairs
        ]

    def _attack(
        self, column: str, name: str, epsilon: float, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> Tensor:
        one = self.contestant
        if column == "black_box":
            return self._blind(name, epsilon)(one.model, images, labels, seeds=seeds)
        if column == "white_box":
            if not one.differentiable:
                return images  # the organisers' gradients find nothing to follow
            return self._seeing(name, epsilon)(one.model, images, labels, seeds=seeds)
        attacks = dict[str, Attack]()
        if one.differentiable:
            attacks[name] = self._seeing(name, epsilon)
        if not one.known:  # what it hides is not known: attacks that need no gradient of it
            attacks |= {each: self._blind(each, epsilon) for each in self.black_box}
        if not attacks:
            return images
        worst = WorstCase(attacks=attacks)
        return worst.run(one.revealed, images, labels, seeds=seeds, scored_on=one.model).images

    def _seeing(self, name: str, epsilon: float) -> Attack:
        options: dict[str, Any] = {} if name in ("fgsm", "ffgsm") else {"steps": self.setting.steps}
        return build_attack(name, epsilon, **options)

    def _blind(self, name: str, epsilon: float) -> Attack:
        if name == "square":
            return build_attack("square", epsilon, queries=self.setting.queries)
        twin = self.contestant.twin
        assert twin is not None
        return _Transfer(build_attack("pgd", epsilon, steps=self.setting.steps), twin)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares of right answers, one number a draw."""

    columns: dict[str, list[float]]
    weights: dict[str, float]

    def total(self, adaptive: bool = False) -> list[float]:
        """The weighted score of each draw."""
        parts = [part for part in PARTS if part in self.columns and self.weights[part] > 0]
        mass = sum(self.weights[part] for part in parts)
        shown = {part: "adaptive" if adaptive and part == "white_box" else part for part in parts}
        draws = len(self.columns["clean"])
        return [
            sum(self.weights[part] * self.columns[shown[part]][draw] for part in parts) / mass
            for draw in range(draws)
        ]

    def as_json(self) -> dict[str, Any]:
        """All draws, and the mean and spread of each column."""
        rows = {**self.columns, "score": self.total(), "adaptive_score": self.total(adaptive=True)}
        return {name: {**interval(draws), "draws": draws} for name, draws in rows.items()}


def interval(draws: Sequence[float]) -> dict[str, float | None]:
    """Mean, and two standard deviations to either side: where one more draw may well fall.

    A single draw does not tell: `low` and `high` are None.
    """
    mean = fmean(draws)
    if len(draws) == 1:
        return {"mean": mean, "low": None, "high": None}
    spread = 2 * stdev(draws)
    return {"mean": mean, "low": max(0.0, mean - spread), "high": min(1.0, mean + spread)}
