"""Which attack each image gets in each draw, and whether the submission still classifies it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from robust_submission.attacks import Attack, Model, WorstCase, build_attack, image_seeds
from robust_submission.attacks.base import correct
from robust_submission.data.corruptions import CORRUPTIONS, Corruption
from robust_submission.data.dataset import ImageDataset
from robust_submission.data.loader import EvaluationLoader, micro_batch_size
from robust_submission.evaluation.jobs import Attacker
from robust_submission.leaderboard.load import Submission
from robust_submission.leaderboard.settings import AttackPool

SCORE_PARTS = ("clean", "corrupted", "black_box", "white_box")
"""The parts of the score."""

BLOCK = 256
"""Images held at once; those that get the same attack, in any draw, are attacked together."""

_Change = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, labels, seeds to changed images


class Scorer:
    """Attacks batches of images and says which of them the submission classifies correctly."""

    def __init__(self, submission: Submission, pool: AttackPool) -> None:
        self.submission, self.pool = submission, pool
        self.black_box = [
            name for name in pool.black_box if name == "square" or submission.twin is not None
        ]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the board; without a black-box attack there is no such column."""
        parts = [part for part in SCORE_PARTS if part != "black_box" or self.black_box]
        return (*parts, Attacker.ADAPTIVE)

    def classified(
        self,
        column: str,
        draws: int,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        tick: Callable[[int], object] = lambda count: None,
    ) -> Tensor:
        """Which images are classified correctly after what each draw does to them.

        Args:
            column: One of `columns`.
            draws: Number of draws of attacks and of their randomness.
            images: (B, 3, S, S), float32, RGB, 0 to 1. In one draw few of them get the same attack;
                in all draws together enough to attack them as batches.
            labels: (B,), int64.
            indices: (B,), the places of the images in their source.
            tick: Called with a number of images whenever so many are done.

        Returns:
            (draws, B) bool.
        """
        if column == "clean":
            same = self._classified(_unchanged, images, labels, indices, tick)
            tick((draws - 1) * len(images))
            return same.expand(draws, -1)
        changes = self._changes(column)
        part = "white_box" if column == Attacker.ADAPTIVE else column  # the same per image
        place, count = SCORE_PARTS.index(part), len(changes)
        found = torch.zeros(draws, len(images), dtype=torch.bool)
        chosen = [self._choose(place, draw, indices.tolist(), count) for draw in range(draws)]
        seeds = [image_seeds(1000 * self.pool.seed + draw, indices) for draw in range(draws)]
        for choice, change in enumerate(changes):
            pairs = torch.from_numpy(np.stack(chosen) == choice).nonzero(as_tuple=True)
            some = pairs[1]
            found[pairs] = self._classified(
                change, images[some], labels[some], torch.stack(seeds)[pairs], tick
            )
        return found

    def _classified(
        self,
        change: _Change,
        images: Tensor,
        labels: Tensor,
        seeds: Tensor,
        tick: Callable[[int], object],
    ) -> Tensor:
        """Which images are classified correctly after a change, (B,) bool, in batches."""
        found = list[Tensor]()
        for some in torch.arange(len(images)).split(micro_batch_size(images.shape[-1])):
            changed = change(images[some], labels[some], seeds[some])
            with torch.no_grad():
                found.append(correct(self.submission.model(changed), labels[some]))
            tick(len(some))
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)

    def _choose(self, part: int, draw: int, indices: list[int], count: int) -> np.ndarray:
        """The attack of each image: a function of (seed, draw, part, index) alone."""
        keys = [[self.pool.seed, draw, part, index] for index in indices]
        return np.array([np.random.default_rng(key).integers(count) for key in keys])

    def _changes(self, column: str) -> list[_Change]:
        """What may be done to an image, each with the same probability."""
        pool = self.pool
        if column == "corrupted":
            kinds = [(name, severity) for name in CORRUPTIONS for severity in pool.severities]
            return [_corrupt(Corruption(name=name, severity=level)) for name, level in kinds]
        names = self.black_box if column == "black_box" else pool.white_box
        attack = {"black_box": self._without_gradients, "white_box": self._by_gradient}
        attacks = [(name, epsilon) for name in names for epsilon in pool.epsilon]
        if column == Attacker.ADAPTIVE:
            return [self._adaptive(name, epsilon) for name, epsilon in attacks]
        if column == "white_box" and not self.submission.differentiable:
            return [_unchanged] * len(attacks)
        return [self._oblivious(attack[column](name, epsilon)) for name, epsilon in attacks]

    def _oblivious(self, attack: Attack) -> _Change:
        """An attack on the model as it is, as the organisers make it."""
        model = self.submission.model
        return lambda images, labels, seeds: attack(model, images, labels, seeds=seeds)

    def _adaptive(self, name: str, epsilon: float) -> _Change:
        """The attack through the revealed model; black-box ones too where no masking is known."""
        attacks: dict[str, Attack] = {}
        if self.submission.differentiable:
            attacks[name] = self._by_gradient(name, epsilon)
        if not self.submission.known:
            attacks |= {each: self._without_gradients(each, epsilon) for each in self.black_box}
        if not attacks:
            return _unchanged
        worst, one = WorstCase(attacks=attacks), self.submission
        return lambda images, labels, seeds: (
            worst.run(one.revealed, images, labels, seeds=seeds, scored_on=one.model).images
        )

    def _by_gradient(self, name: str, epsilon: float) -> Attack:
        if name in ("fgsm", "ffgsm"):
            return build_attack(name, epsilon)
        return build_attack(name, epsilon, steps=self.pool.steps)

    def _without_gradients(self, name: str, epsilon: float) -> Attack:
        if name == "square":
            return build_attack("square", epsilon, queries=self.pool.queries)
        assert self.submission.twin is not None
        return _Transfer(build_attack("pgd", epsilon, steps=self.pool.steps), self.submission.twin)


def _unchanged(images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
    return images


def _corrupt(corruption: Corruption) -> _Change:
    return lambda images, labels, seeds: corruption.batch(images, seeds)


@dataclass(frozen=True)
class _Transfer:
    """An attack on the twin, whatever model it is given."""

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


def measure_columns(scorer: Scorer, dataset: ImageDataset, draws: int) -> dict[str, list[float]]:
    """The share of correctly classified images in each column, one number per draw."""
    loader = EvaluationLoader(dataset, batch_size=BLOCK, num_workers=0)
    hits = {column: np.zeros(draws, dtype=np.int64) for column in scorer.columns}
    with tqdm(total=len(dataset) * len(hits) * draws, unit="image") as bar:
        for batch in loader:
            images = (batch["images"], batch["labels"], batch["indices"])
            for column, found in hits.items():
                bar.set_description(column)
                classified = scorer.classified(column, draws, *images, tick=bar.update)
                found += classified.sum(dim=1).numpy()
    return {column: (found / len(dataset)).tolist() for column, found in hits.items()}
