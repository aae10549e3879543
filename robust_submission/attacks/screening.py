"""Screening: finds in a few short runs nearly what AutoAttack finds on an honest model.

    Screen(epsilon=8 / 255)(model, images, labels)

Work goes where it may change an image's outcome: a fooled image is done at once, and an image whose
margin hardly moved is given up. On a model that hides its gradients it finds nothing, and proves
nothing: AutoAttack's FAB and Square have no counterpart here.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robust_submission.attacks.base import (
    BallAttack,
    Draws,
    Model,
    check_at_least,
    check_choice,
    correct,
    input_gradient,
)
from robust_submission.attacks.early_stop import EarlyStop
from robust_submission.attacks.ensemble import WorstPoints
from robust_submission.attacks.losses import margin
from robust_submission.attacks.norms import NORMS


class _Run(NamedTuple):
    target: int
    """0: any class; k: the k-th easiest target."""
    steps: int
    near: float
    """Only for images of whose clean margin at most this share is left."""


RUNS = (
    _Run(target=0, steps=20, near=1),
    _Run(target=1, steps=20, near=1),
    _Run(target=2, steps=20, near=0.8),
    _Run(target=3, steps=20, near=0.7),
    _Run(target=4, steps=20, near=0.6),
    _Run(target=1, steps=50, near=0.4),
    _Run(target=0, steps=50, near=0.4),
)
CANDIDATES = 9
"""Most likely other classes among which the easiest targets are looked for, as many as AutoAttack's
targets."""
MOMENTUM = 0.25
"""Share of the last move that a step keeps, as in APGD."""


@dataclass(frozen=True, kw_only=True)
class Screen(BallAttack):
    """A fast stand-in for AutoAttack on honest models, for L-infinity and L2.

    Runs ascend the margin (Carlini & Wagner 2017) with the momentum of APGD (Croce & Hein 2020),
    whose steps shrink along a cosine from 2 epsilon as in A3 (Liu et al. 2022), from random starts.
    The first is for every image and against any class. The others are for what still stands, each
    for fewer images: as in A3, those of which less margin is left. They go for the targets that
    MALT (Melamed et al. 2024) ranks first: the gap of two logits over the dual norm of its gradient
    at the clean image, the distance to a linear boundary.

    Returns an image's first point that fools the model, else the last point of the run that left
    the least margin. An image's result depends on no other image of the batch.
    """

    norm: str = "linf"
    """The ball: "linf" or "l2"."""

    epsilon: float = 8 / 255
    """The ball's radius, in units of the 0-to-1 image; at 0 images come back bit for bit."""

    early_stop: bool = False
    """End an image's run at the first point that fools the model, and leave an image that is wrong
    without an attack unchanged. Leave it off for a random model, where one draw proves nothing."""

    seed: int = 0
    """Seeds the random starts, if the call has neither generator nor seeds."""

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ["linf", "l2"])
        check_at_least("epsilon", self.epsilon, 0)

    def passes(self, num_classes: int) -> int:
        runs = sum(2 * run.steps + 1 for run in RUNS if run.target < num_classes)
        return 2 + runs + 2 * min(CANDIDATES, num_classes - 1)

    def _perturb(self, model: Model, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        clean, wrong = _margins(model, images, labels)
        worst = WorstPoints(images.clone(), clean.clone(), wrong & self.early_stop)
        targets = labels[:, None]  # (B, 1 + targets): the label stands for any other class
        for run in RUNS:
            rows = (~worst.fooled & (worst.losses >= run.near * clean)).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            if run.target and targets.shape[1] == 1:
                targets = self._with_targets(model, images, labels, ~worst.fooled)
            if run.target >= targets.shape[1]:
                continue
            pairs = torch.stack([labels[rows], targets[rows, run.target]], dim=1)
            starts = NORMS[self.norm].random_start(images[rows], self.epsilon, draws.of(rows))
            points = self._ascend(model, images[rows], pairs, starts, run.steps)
            worst.update(rows, points, *_margins(model, points, labels[rows]))
        return worst.points

    def _ascend(
        self, model: Model, images: Tensor, pairs: Tensor, points: Tensor, steps: int
    ) -> Tensor:
        """One run; `pairs` (B, 2) are as `_lead` takes them."""
        norm, before = NORMS[self.norm], points
        early_stop = EarlyStop(points) if self.early_stop else None
        for step in range(steps):
            gradient, logits = input_gradient(model, points, pairs, _lead)
            if early_stop:
                points, before, images, pairs, gradient = early_stop.drop(
                    ~correct(logits, pairs[:, 0]), points, before, images, pairs, gradient
                )
                if len(points) == 0:
                    break
            size = self.epsilon * (1 + math.cos(math.pi * step / steps))
            ahead = points + size * norm.direction(gradient.nan_to_num(), points)
            ahead = norm.project(ahead, images, self.epsilon)
            moved = points + (1 - MOMENTUM) * (ahead - points) + MOMENTUM * (points - before)
            points, before = norm.project(moved, images, self.epsilon), points
        return early_stop.finish(points) if early_stop else points

    def _with_targets(
        self, model: Model, images: Tensor, labels: Tensor, standing: Tensor
    ) -> Tensor:
        """(B, 1 + targets): the label, then the other classes, the easiest first; labels alone for
        images that are not `standing`, (B,) bool."""
        images, own = images[standing], labels[standing]
        with torch.no_grad():
            logits = model(images).float()
        others = logits.scatter(1, own[:, None], -torch.inf)
        others = others.topk(min(CANDIDATES, logits.shape[1] - 1), dim=1).indices
        distances = list[Tensor]()
        for target in others.T:
            pairs = torch.stack([own, target], dim=1)
            gradient, logits = input_gradient(model, images, pairs, _lead)
            size = gradient.nan_to_num().flatten(1).norm(p=1 if self.norm == "linf" else 2, dim=1)
            distances.append(-_lead(logits, pairs) / size)
        easiest = others.gather(1, torch.stack(distances, dim=1).argsort(dim=1, stable=True))
        targets = labels[:, None].repeat(1, 1 + others.shape[1])
        targets[standing, 1:] = easiest
        return targets


def _margins(model: Model, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Margins (B,), and whether the model is fooled (B,)."""
    with torch.no_grad():
        logits = model(points).float()
    return margin(logits, labels), ~correct(logits, labels)


def _lead(logits: Tensor, pairs: Tensor) -> Tensor:
    """(B,): the margin of a target over the label, as `pairs` (B, 2) of label and target; of the
    largest other logit where the two are equal."""
    label, target = pairs.T
    own = logits.gather(1, pairs)
    return torch.where(label == target, margin(logits, label), own[:, 1] - own[:, 0])
