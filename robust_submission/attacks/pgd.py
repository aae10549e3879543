"""The gradient attacks: FGSM, FFGSM, BIM, MIM, PGD and noise, one loop with a norm plugged in.

    PGD(norm="linf", epsilon=8 / 255, step_size=2 / 255, steps=10)(model, images, labels)

The model is called in the mode it is in: in training mode batch normalisation sees the attack's
images. Give the bare module, not DistributedDataParallel, whose reducer waits for a backward pass
that an attack does not make.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robust_submission.attacks.base import (
    Draws,
    Model,
    check_at_least,
    check_batch,
    check_choice,
    check_differentiable,
    correct,
    differentiable,
    ordinary,
)
from robust_submission.attacks.losses import LOSSES, Loss
from robust_submission.attacks.norms import NORMS, rescaled
from robust_submission.cli.errors import UserError


def input_gradient(
    model: Model, images: Tensor, labels: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """The gradient of each image's loss with respect to the image, and the logits.

    Computes no gradient for any parameter. Call it where gradients are recorded. On its way through
    the model each image's gradient is near 1 at the logits, by a power of two that is taken out in
    the end: that of a confident image would vanish in float16. Where images see one another, by
    batch normalisation in training mode, these powers weigh what one's loss does to another.

    Args:
        model: Any callable from images to logits.
        images: (B, 3, H, W), float32.
        labels: (B,), int64, or what else the loss takes.
        loss: From logits and labels to (B,).

    Returns:
        (B, 3, H, W), as autograd gives it (it may hold NaN), and (B, num_classes), float32.

    Raises:
        UserError: the logits do not depend on the images in a way that autograd can follow.
    """
    images = images.detach().requires_grad_()
    logits = model(images).float()
    check_differentiable(logits.requires_grad)
    (outer,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
    powers = outer.abs().amax(dim=1, keepdim=True).clamp(1e-30, 1e30).log2().floor().exp2()
    (gradient,) = torch.autograd.grad(logits, images, outer / powers, allow_unused=True)
    check_differentiable(gradient is not None)
    return gradient * powers[:, :, None, None], logits.detach()


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient descent (Madry et al. 2018), and the loop of all attacks here.

    Returns the last point; with `early_stop` the first that fools the model, else the last.
    """

    norm: str = "linf"
    """The ball: "linf", "l2", "l1" (sparse steps, SLIDE) or "l1-dense" (as foolbox's L1 PGD)."""

    epsilon: float = 8 / 255
    """The ball's radius, in units of the 0-to-1 image; at 0 images come back bit for bit."""

    step_size: float | None = None
    """The size of a step, in the ball's norm. None: 2.5 epsilon / steps, so that steps cross the
    ball more than once (1.25 epsilon for FFGSM, epsilon / steps for FGSM, BIM and MIM)."""

    steps: int = 10
    """Gradient steps, each one forward and one backward pass."""

    random_start: bool = True
    """Start at a point drawn from the ball instead of at the image."""

    restarts: int = 1
    """Runs from different starts. Of several, each judged by one more forward pass, an image keeps
    the point that fools the model, the one of larger loss among equals."""

    decay: float = 0.0
    """How much of the earlier gradients a step keeps (Dong et al. 2018, mu); 0: none."""

    loss: str | Loss = "ce"
    """What is raised: "ce", "margin", "dlr", or a function from logits and labels to (B,)."""

    targeted: bool = False
    """Labels are the wanted classes: the loss is lowered, and a hit is a success."""

    early_stop: bool = False
    """Take an image out of the batch at the first point that fools the model. Whoever counts an
    image as fooled when any point on the way fools gets the same images fooled, for less; costs no
    forward pass. Leave it off in training (it reads values back from the device) and for a random
    model, where one draw proves nothing."""

    seed: int = 0
    """Of the random start, where the call brings neither generator nor seeds."""

    stride: ClassVar[float] = 2.5
    """The step size where none is given, in units of epsilon / steps."""

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, list(NORMS))
        check_at_least("epsilon", self.epsilon, 0)
        check_at_least("steps", self.steps, 1 if self.stride else 0)
        check_at_least("restarts", self.restarts, 1)
        check_at_least("decay", self.decay, 0)
        if self.step_size is not None:
            check_at_least("step_size", self.step_size, 0)
        if isinstance(self.loss, str):
            check_choice("loss", self.loss, list(LOSSES))
        if self.restarts > 1 and not self.random_start:
            raise UserError("Expected random_start=True with restarts above 1. Received: False.")

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch: see `Attack`. Labels may be probabilities (B, num_classes) with "ce",
        where neither early stop nor restarts have to judge."""
        check_batch(images, labels)
        if labels.ndim != 1 and (self.early_stop or self.restarts > 1):
            raise UserError(
                "Expected class indices (B,) with early_stop or restarts. "
                f"Received: labels of shape {tuple(labels.shape)}."
            )
        draws = Draws.choose(len(images), generator, seeds, self.seed)
        with differentiable():
            images, labels = ordinary(images), ordinary(labels)
            if self.epsilon == 0 or len(images) == 0:
                return images.clone()
            if self.restarts == 1:
                return self._climb(model, images, labels, draws)
            return self._best_of_restarts(model, images, labels, draws)

    def _objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        return -loss(logits, labels) if self.targeted else loss(logits, labels)

    def _fooled(self, logits: Tensor, labels: Tensor) -> Tensor:
        hit = correct(logits, labels)
        return hit if self.targeted else ~hit

    def _climb(self, model: Model, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        norm = NORMS[self.norm]
        step_size = self.step_size
        if step_size is None:
            step_size = self.stride * self.epsilon / max(self.steps, 1)
        points = norm.random_start(images, self.epsilon, draws) if self.random_start else images
        velocity = None
        found = torch.empty_like(images) if self.early_stop else points
        rows = torch.arange(len(images), device=images.device)
        going = torch.ones_like(rows, dtype=torch.bool)
        for _ in range(self.steps):
            gradient, logits = input_gradient(model, points, labels, self._objective)
            gradient = gradient.nan_to_num()  # a NaN moves nothing, infinity counts as large
            velocity = self._accumulate(velocity, gradient)
            if self.early_stop and (fooled := going & self._fooled(logits, labels)).any():
                found[rows[fooled]] = points[fooled]
                going = going & ~fooled
                if not going.any():
                    return found
                kept = _filled_up(going)
                rows, going, points, images, labels, velocity = (
                    each[kept] for each in (rows, going, points, images, labels, velocity)
                )
            points = torch.add(points, norm.direction(velocity, points), alpha=step_size)
            points = norm.project(points, images, self.epsilon)
        if not self.early_stop:
            return points
        found[rows[going]] = points[going]
        return found

    def _accumulate(self, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        if self.decay == 0:
            return gradient
        gradient = rescaled(gradient)  # the step's direction is free of scale
        average = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        gradient = gradient / average.clamp_min(torch.finfo(gradient.dtype).tiny)
        return gradient if velocity is None else self.decay * velocity + gradient

    def _best_of_restarts(
        self, model: Model, images: Tensor, labels: Tensor, draws: Draws
    ) -> Tensor:
        best = images.clone()
        best_loss = images.new_full((len(images),), -torch.inf)
        best_fooled = torch.zeros_like(best_loss, dtype=torch.bool)
        for _ in range(self.restarts):
            rows = (~best_fooled | (not self.early_stop)).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            points = self._climb(model, images[rows], labels[rows], draws.of(rows))
            with torch.no_grad():
                logits = model(points).float()
            loss = self._objective(logits, labels[rows])
            fooled = self._fooled(logits, labels[rows])
            same = fooled == best_fooled[rows]
            better = (fooled & ~best_fooled[rows]) | (same & (loss > best_loss[rows]))
            chosen = rows[better]
            best[chosen], best_loss[chosen] = points[better], loss[better]
            best_fooled[chosen] = fooled[better]
        return best


def _filled_up(going: Tensor) -> Tensor:
    """Which of a batch to keep, bool (B,): those that go on, and others up to a multiple of eight.

    A network prepares itself for every new size of batch, and its memory is cut to it.
    """
    surplus = (~going).cumsum(0)
    return going | (surplus <= -going.sum() % 8)


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """Fast gradient sign method (Goodfellow et al. 2015): one step of size epsilon."""

    stride: ClassVar[float] = 1.0
    steps: int = field(default=1, init=False)
    random_start: bool = field(default=False, init=False)


@dataclass(frozen=True, kw_only=True)
class FFGSM(PGD):
    """FGSM from a random start, "fast" adversarial training's attack (Wong et al. 2020)."""

    stride: ClassVar[float] = 1.25
    steps: int = field(default=1, init=False)
    random_start: bool = field(default=True, init=False)


@dataclass(frozen=True, kw_only=True)
class BIM(PGD):
    """Basic iterative method (Kurakin et al. 2017): PGD that starts at the image."""

    stride: ClassVar[float] = 1.0
    random_start: bool = field(default=False, init=False)


@dataclass(frozen=True, kw_only=True)
class MIM(BIM):
    """Momentum iterative method (Dong et al. 2018)."""

    decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class UniformNoise(PGD):
    """A control: a point drawn uniformly from the ball, without any gradient."""

    stride: ClassVar[float] = 0.0
    steps: int = field(default=0, init=False)
    random_start: bool = field(default=True, init=False)
