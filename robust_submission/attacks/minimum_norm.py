"""Minimum-norm attacks, FMN and DDN: for each image the nearest point found that fools the model.

    nearest = FMN(norm="linf", steps=50).nearest(model, images, labels)
    nearest.images, nearest.distances

One run gives robust accuracy at every radius: the share of images whose distance is larger.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_submission.attacks.base import (
    BallAttack,
    Draws,
    Model,
    attacking,
    check_at_least,
    check_choice,
    input_gradient,
)
from robust_submission.attacks.losses import margin
from robust_submission.attacks.norms import NORMS

CLEAR = 1e-5
"""By how much the margin must exceed 0, in units of the largest logit. Nearer to the decision
rounding decides, and a point that fools in one batch may not in another."""
SHRINK, LEAST_SHRINK, LEAST_STEP = 0.05, 1e-3, 1e-2
"""By which share a radius changes at first and, in FMN, at last; the last step over the first."""
DUAL = {"linf": NORMS["l1"], "l2": NORMS["l2"], "l1": NORMS["linf"], "l1-dense": NORMS["linf"]}


@dataclass(frozen=True)
class Nearest:
    """The nearest adversarial images found."""

    images: Tensor
    """(B, 3, H, W); the clean image where none was found."""
    distances: Tensor
    """(B,), in the attack's norm; infinite where none was found."""

    def update(self, points: Tensor, distances: Tensor, fooled: Tensor) -> None:
        """Take the points that fool, (B,) bool, from nearer than before."""
        nearer = fooled & (distances < self.distances)  # rows[nearer] would wait for the device
        self.images.copy_(torch.where(nearer[:, None, None, None], points, self.images))
        self.distances.copy_(torch.where(nearer, distances, self.distances))


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(BallAttack):
    """What FMN and DDN share: a ball that shrinks where a point fools, and grows where it does not.

    Both start at the image and draw nothing: generator and seeds have no effect. They maximise the
    margin, which keeps its gradient however far the logits lie apart.
    """

    norm: str
    epsilon: float
    """The largest distance, in units of the 0-to-1 image."""

    steps: int = 50
    """Gradient steps, each one forward and one backward pass; at least 2, as the first is at the
    image itself, and where the last one leads is not looked at."""

    norms: ClassVar[Sequence[str]]

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, self.norms)
        check_at_least("epsilon", self.epsilon, 0)
        check_at_least("steps", self.steps, 2)

    def passes(self, num_classes: int) -> int:
        return 2 * self.steps

    def nearest(self, model: Model, images: Tensor, labels: Tensor) -> Nearest:
        """Search for the nearest point that fools, as far as `epsilon`.

        Args:
            model: Any callable from images to logits.
            images: (B, 3, H, W), float32, RGB, 0 to 1.
            labels: (B,), int64.

        Raises:
            ValueError: images or labels are of the wrong shape or type.
            UserError: the model has no gradient.
        """
        with attacking(images, labels) as (images, labels):
            return self._search(model, images, labels)

    def _perturb(self, model: Model, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        return self._search(model, images, labels).images

    def _search(self, model: Model, images: Tensor, labels: Tensor) -> Nearest:
        norm, dual = NORMS[self.norm], DUAL[self.norm]
        best = Nearest(images.clone(), images.new_full((len(images),), torch.inf))
        points, radii = images, images.new_zeros(len(images))
        for step in range(self.steps):
            gradient, logits = input_gradient(model, points, labels, margin)
            gradient, margins = gradient.nan_to_num(), margin(logits, labels)
            distances = norm.size(points - images)
            largest = logits.nan_to_num(torch.nan, 0, 0).abs().amax(dim=1)  # -inf forbids a class
            fooled = ~(margins <= CLEAR * largest)  # NaN fools
            best.update(points, distances, fooled)
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2  # from 1 to 0
            # Where a linear model would reach the decision.
            reach = distances + margins.abs() / dual.size(gradient).clamp_min(1e-30)
            radii = self._radii(radii, fooled, best.distances, reach.nan_to_num(), cosine)
            radii = radii.clamp(1e-12, self.epsilon)
            step_size = LEAST_STEP + (1 - LEAST_STEP) * cosine
            points = self._moved(points, images, radii, gradient, step_size)
        return best

    @abstractmethod
    def _radii(
        self, radii: Tensor, fooled: Tensor, nearest: Tensor, reach: Tensor, cosine: float
    ) -> Tensor:
        """The next radii (B,), from those of before; 0 at the first step."""

    @abstractmethod
    def _moved(
        self, points: Tensor, images: Tensor, radii: Tensor, gradient: Tensor, step_size: float
    ) -> Tensor:
        """The next points, in the balls and in 0 to 1; step sizes fall from 1."""


@dataclass(frozen=True, kw_only=True)
class FMN(MinimumNorm):
    """Fast minimum-norm attack (Pintor et al. 2021, algorithm 1), for L-infinity and L1.

    Two things differ. Until a point fools, the radius is where a linear model would reach the
    decision, but grows in every step: where pixels are at 0 or 1 already, a linear model expects
    too much. In L-infinity a step is the gradient's sign times the radius, so that its size fits
    any image and model.
    """

    norm: str = "linf"
    """The ball: "linf", "l1" or "l1-dense", which is the same here."""
    epsilon: float = 0.5

    norms: ClassVar[Sequence[str]] = ("linf", "l1", "l1-dense")

    def _radii(
        self, radii: Tensor, fooled: Tensor, nearest: Tensor, reach: Tensor, cosine: float
    ) -> Tensor:
        rate = LEAST_SHRINK + (SHRINK - LEAST_SHRINK) * cosine
        grown = radii * (1 + rate)
        grown = torch.where(nearest.isinf(), torch.maximum(grown, reach), grown)
        return torch.where(fooled, torch.minimum(radii * (1 - rate), nearest), grown)

    def _moved(
        self, points: Tensor, images: Tensor, radii: Tensor, gradient: Tensor, step_size: float
    ) -> Tensor:
        step = NORMS["l2"].direction(gradient, points)
        if self.norm == "linf":
            step = radii[:, None, None, None] * gradient.sign()
        return NORMS[self.norm].project(points + step_size * step, images, radii)


@dataclass(frozen=True, kw_only=True)
class DDN(MinimumNorm):
    """Decoupled direction and norm (Rony et al. 2019, algorithm 1), for L2.

    The first radius is where a linear model would reach the decision, not 1, and the first step as
    long as the radius, so that images and models of any size need the same number of steps.
    """

    norm: str = "l2"
    """The ball: "l2" alone."""
    epsilon: float = 8.0

    norms: ClassVar[Sequence[str]] = ("l2",)

    def _radii(
        self, radii: Tensor, fooled: Tensor, nearest: Tensor, reach: Tensor, cosine: float
    ) -> Tensor:
        return torch.where(radii == 0, reach, radii * torch.where(fooled, 1 - SHRINK, 1 + SHRINK))

    def _moved(
        self, points: Tensor, images: Tensor, radii: Tensor, gradient: Tensor, step_size: float
    ) -> Tensor:
        step = radii[:, None, None, None] * NORMS["l2"].direction(gradient, points)
        moved = points - images + step_size * step
        scale = radii / NORMS["l2"].size(moved).clamp_min(1e-30)  # onto the sphere
        return (images + scale[:, None, None, None] * moved).clamp_(0, 1)
