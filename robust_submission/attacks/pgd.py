"""The gradient attacks FGSM, FFGSM, BIM, MIM, PGD and uniform noise: one loop, any norm.

    PGD(norm="linf", epsilon=8 / 255, step_size=2 / 255, steps=10)(model, images, labels)

The model is called in its current mode: in training mode batch normalisation sees the attack's
images. Pass the bare module, not DistributedDataParallel, whose reducer waits for a backward pass
to the parameters that an attack does not make.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

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
from robust_submission.attacks.losses import LOSSES, Loss
from robust_submission.attacks.norms import NORMS, rescaled


@dataclass(frozen=True, kw_only=True)
class PGD(BallAttack):
    """Projected gradient descent (Madry et al. 2018); the other gradient attacks are cases of it.

    Returns the last point; with `early_stop` the first that fools the model, if any does.
    """

    norm: str = "linf"
    """The ball: "linf", "l2", "l1" (sparse steps, SLIDE) or "l1-dense" (as foolbox's L1 PGD)."""

    epsilon: float = 8 / 255
    """The ball's radius, in units of the 0-to-1 image; at 0 images are returned bit for bit."""

    step_size: float | None = None
    """The size of a step, in the ball's norm. None: 2.5 epsilon / steps, so that the steps can
    cross the ball (1.25 epsilon for FFGSM, epsilon / steps for FGSM, BIM and MIM)."""

    steps: int = 10
    """Gradient steps, each one forward and one backward pass."""

    random_start: bool = True
    """Start at a point drawn from the ball instead of at the image."""

    noise: float = 1.0
    """The radius of the random start, in units of epsilon."""

    clip: bool = True
    """Keep the points in the ball. Without it a point may leave the ball, by its start and by each
    step: for training only, as in N-FGSM (de Jorge et al. 2022), which starts at twice epsilon."""

    restarts: int = 1
    """Runs from different starts. With more than one, each run costs one more forward pass, and
    the result is a point that fools the model if there is one; among equals, that of larger
    loss."""

    decay: float = 0.0
    """How much of the earlier gradients a step keeps (mu of Dong et al. 2018); 0 for none."""

    loss: str | Loss = "ce"
    """The loss to maximise: "ce", "bounded-ce", "margin", "dlr", or a function from logits and
    labels to (B,)."""

    targeted: bool = False
    """Labels are target classes: the loss is minimised, and predicting the target is success."""

    early_stop: bool = False
    """End an image's run at the first point that fools the model. Fools every image that any point
    on the way fools, for less time and no extra forward pass. Leave it off in training (it waits
    for the device: see `early_stop.EVERY`) and for a random model, where one draw proves
    nothing."""

    seed: int = 0
    """Seeds the random start, if the call has neither generator nor seeds."""

    stride: ClassVar[float] = 2.5
    """The default step size, in units of epsilon / steps."""

    observe: Callable[[Tensor, Tensor, Tensor], object] | None = field(
        default=None, repr=False, compare=False
    )
    """Called at each step with the points, their gradient and logits; see `Trajectory`."""

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, list(NORMS))
        check_at_least("epsilon", self.epsilon, 0)
        check_at_least("steps", self.steps, 1 if self.stride else 0)
        check_at_least("restarts", self.restarts, 1)
        check_at_least("decay", self.decay, 0)
        check_at_least("noise", self.noise, 0)
        if self.step_size is not None:
            check_at_least("step_size", self.step_size, 0)
        if isinstance(self.loss, str):
            check_choice("loss", self.loss, list(LOSSES))
        if self.restarts > 1 and not self.random_start:
            raise ValueError("random_start: expected True with restarts above 1, found False.")

    def passes(self, num_classes: int) -> int:
        return (2 * self.steps + (self.restarts > 1)) * self.restarts

    def _perturb(self, model: Model, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Labels may be probabilities (B, num_classes) with "ce", unless fooling has to be tested
        for early stop or restarts."""
        if labels.ndim != 1 and (self.early_stop or self.restarts > 1):
            found = f"shape {tuple(labels.shape)}"
            raise ValueError(
                f"labels: expected classes (B,) with early_stop or restarts, found {found}."
            )
        if self.restarts == 1:
            return self._ascend(model, images, labels, draws)
        return self._worst_of_restarts(model, images, labels, draws)

    def _ascend(self, model: Model, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """One run: at each step gradient, step, project."""
        norm, velocity = NORMS[self.norm], None
        radius = self.epsilon if self.clip else torch.inf
        points = images
        if self.random_start:
            points = norm.random_start(images, self.noise * self.epsilon, draws)
        early_stop = EarlyStop(points) if self.early_stop else None
        for _ in range(self.steps):
            gradient, logits = input_gradient(model, points, labels, self._objective)
            if self.observe:
                self.observe(points, gradient, logits)
            velocity = self._momentum(velocity, gradient)
            if early_stop:
                points, images, labels, velocity = early_stop.drop(
                    self._fooled(logits, labels), points, images, labels, velocity
                )
                if len(points) == 0:
                    break
            points = torch.add(points, norm.direction(velocity, points), alpha=self.step)
            points = norm.project(points, images, radius)
        return early_stop.finish(points) if early_stop else points

    @property
    def step(self) -> float:
        """The size of a step: `step_size`, or the default if that is None."""
        if self.step_size is not None:
            return self.step_size
        return self.stride * self.epsilon / max(self.steps, 1)

    def _momentum(self, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        gradient = gradient.nan_to_num()  # NaN moves nothing, infinity counts as large
        if self.decay == 0:
            return gradient
        gradient = rescaled(gradient)  # the step's direction does not depend on the scale
        average = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        gradient = gradient / average.clamp_min(torch.finfo(gradient.dtype).tiny)
        return gradient if velocity is None else self.decay * velocity + gradient

    def _objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        return -loss(logits, labels) if self.targeted else loss(logits, labels)

    def _fooled(self, logits: Tensor, labels: Tensor) -> Tensor:
        hit = correct(logits, labels)
        return hit if self.targeted else ~hit

    def _worst_of_restarts(
        self, model: Model, images: Tensor, labels: Tensor, draws: Draws
    ) -> Tensor:
        losses = images.new_full((len(images),), -torch.inf)
        worst = WorstPoints(images.clone(), losses, torch.zeros_like(losses, dtype=torch.bool))
        for _ in range(self.restarts):
            rows = (~worst.fooled | (not self.early_stop)).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            points = self._ascend(model, images[rows], labels[rows], draws.of(rows))
            with torch.no_grad():
                logits = model(points).float()
            losses = self._objective(logits, labels[rows])
            worst.update(rows, points, losses, self._fooled(logits, labels[rows]))
        return worst.points


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """Fast gradient sign method (Goodfellow et al. 2015): one step of size epsilon."""

    stride: ClassVar[float] = 1.0
    steps: int = field(default=1, init=False)
    random_start: bool = field(default=False, init=False)


@dataclass(frozen=True, kw_only=True)
class FFGSM(PGD):
    """FGSM from a random start, as in "fast" adversarial training (Wong et al. 2020)."""

    stride: ClassVar[float] = 1.25
    steps: int = field(default=1, init=False)
    random_start: bool = field(default=True, init=False)


@dataclass(frozen=True, kw_only=True)
class BIM(PGD):
    """Basic iterative method (Kurakin et al. 2017): PGD from the image itself."""

    stride: ClassVar[float] = 1.0
    random_start: bool = field(default=False, init=False)


@dataclass(frozen=True, kw_only=True)
class MIM(BIM):
    """Momentum iterative method (Dong et al. 2018)."""

    decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class UniformNoise(PGD):
    """A control: a point drawn uniformly from the ball, without a gradient."""

    stride: ClassVar[float] = 0.0
    steps: int = field(default=0, init=False)
    random_start: bool = field(default=True, init=False)
