"""Attacks by well-kept libraries, called like our own: Carlini & Wagner, AutoAttack.

The libraries call `backward` and seed the global generators; neither leaves a trace here.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robust_submission.attacks.base import (
    BallAttack,
    Draws,
    Model,
    check_at_least,
    check_choice,
    require_gradient,
)
from robust_submission.attacks.norms import NORMS

_APGD_PASSES, _FAB_PASSES = 210, 310
"""Of one run, counted: 100 iterations, in FAB each with a search along the way back."""


class _InputGradient(torch.autograd.Function):
    """The model with a graph of its own: backward reaches the images, never a parameter.

    The first backward pass frees the graph, unless others are to follow (`again`).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: Model, again: bool) -> Tensor:
        ctx.again = again
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            ctx.logits = model(ctx.images).float()
        require_gradient(ctx.logits.requires_grad)
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = torch.autograd.grad(
            ctx.logits, ctx.images, outputs, retain_graph=ctx.again, allow_unused=True
        )
        require_gradient(gradient is not None)
        return gradient.nan_to_num(), None, None


def _only_input_gradients(model: Model, *, again: bool = False) -> Callable[[Tensor], Tensor]:
    def call(images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            return _InputGradient.apply(images, model, again)  # pyright: ignore[reportReturnType]
        with torch.no_grad():
            return model(images).float()

    return call


class _Hidden(nn.Module):
    """A module that calls the model without owning it, so that nobody moves it or sets its mode."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, images: Tensor) -> Tensor:
        return self.call(images)


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """Restore the global random state, and the tracing function, which pyautoattack resets."""
    trace = sys.gettrace()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        sys.settrace(trace)


@dataclass(frozen=True, kw_only=True)
class CarliniWagner(BallAttack):
    """Carlini & Wagner's L2 attack (2017) by foolbox: the smallest perturbation that fools.

    One longer than `epsilon` is cut to that length. An image for which none is found is returned
    unchanged. Not random: generator and seeds have no effect. Up to binary_search_steps x steps
    forward and backward passes.
    """

    epsilon: float = 8.0
    """Radius of the L2 ball, in units of the 0-to-1 image (the GCM paper's budget)."""

    norm: str = "l2"
    """The ball: "l2" alone."""

    binary_search_steps: int = 5
    """Searches for the weight between perturbation and misclassification."""

    steps: int = 100
    """Adam steps in each search."""

    step_size: float = 0.05
    """Adam's learning rate. These few steps at 0.05 end within 6 % of the length that 9 searches of
    1,000 steps at 0.01 find (measured on a small model of digits, targeted and untargeted)."""

    initial_const: float = 0.1
    """First weight tried; multiplied by ten for the images where it fails."""

    confidence: float = 0.0
    """How far beyond the decision an example must lie, in logits."""

    targeted: bool = False
    """Labels are target classes."""

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ["l2"])
        check_at_least("epsilon", self.epsilon, 0)
        check_at_least("binary_search_steps", self.binary_search_steps, 1)
        check_at_least("steps", self.steps, 1)
        check_at_least("step_size", self.step_size, 0)
        check_at_least("initial_const", self.initial_const, 0)
        check_at_least("confidence", self.confidence, 0)

    def passes(self, num_classes: int) -> int:
        return 2 * self.binary_search_steps * self.steps

    def _perturb(self, model: Model, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        # foolbox takes seconds to import: only where it is used.
        from foolbox.attacks.carlini_wagner import L2CarliniWagnerAttack
        from foolbox.criteria import Misclassification, TargetedMisclassification
        from foolbox.models.pytorch import PyTorchModel

        criterion = TargetedMisclassification if self.targeted else Misclassification
        hidden = _Hidden(_only_input_gradients(model)).eval()
        attack = L2CarliniWagnerAttack(
            binary_search_steps=self.binary_search_steps,
            steps=self.steps,
            stepsize=self.step_size,
            confidence=self.confidence,
            initial_const=self.initial_const,
            abort_early=False,  # it looks at the loss of the whole batch
        )
        seen = PyTorchModel(hidden, bounds=(0, 1), device=images.device)
        least = attack.run(seen, images, criterion(labels)).detach()
        found = (least != 0).any(dim=(1, 2, 3), keepdim=True)  # foolbox gives zeros for none
        return NORMS["l2"].project(torch.where(found, least, images), images, self.epsilon)


@dataclass(frozen=True, kw_only=True)
class AutoAttack(BallAttack):
    """AutoAttack by its authors (Croce & Hein 2020), with the settings of their standard version.

    One seed is made for the whole batch, from the generator or the seeds: for the same result give
    the same batch. An image that no attack fools is returned unchanged. The targeted DLR loss needs
    four classes: with three, APGD-T is replaced by untargeted DLR, with two by APGD-CE, which then
    ranks points in the same way.
    """

    STANDARD: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-t", "fab-t", "square")
    RANDOM: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-dlr")
    """The authors' "rand" version, for a model whose calls differ: give it as its average (EOT)."""
    KNOWN: ClassVar[tuple[str, ...]] = (*STANDARD, "apgd-dlr", "fab")

    norm: str = "linf"
    """The ball: "linf", "l2" or "l1"."""

    epsilon: float = 8 / 255
    """The ball's radius, in units of the 0-to-1 image; at 0 images come back bit for bit."""

    attacks: tuple[str, ...] = STANDARD
    """The attacks, run in this order, each on the images that withstood the earlier ones."""

    queries: int = 5000
    """Forward passes of Square per image."""

    seed: int = 0
    """Seeds the random draws, if the call has neither generator nor seeds."""

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ["linf", "l2", "l1"])
        check_at_least("epsilon", self.epsilon, 0)
        check_at_least("queries", self.queries, 1)
        if not self.attacks or isinstance(self.attacks, str):
            raise ValueError(f"attacks: expected a tuple of names, found {self.attacks!r}.")
        for attack in self.attacks:
            check_choice("attacks", attack, self.KNOWN)

    def passes(self, num_classes: int) -> int:
        runs, targets = (5, 5) if self.norm == "l1" else (1, 9)
        known = {
            "apgd-ce": _APGD_PASSES * runs,
            "apgd-dlr": _APGD_PASSES * runs,
            "apgd-t": _APGD_PASSES * min(targets, num_classes - 1),
            "fab": _FAB_PASSES,
            "fab-t": _FAB_PASSES * min(9, num_classes - 1),
            "square": self.queries,
        }
        return sum(known[attack] for attack in self._possible(num_classes))

    def _perturb(self, model: Model, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        images = images.contiguous()

        def together(some: Tensor) -> Tensor:
            """The model, with the last image that withstands twice: some models need several."""
            alone = len(some) < min(2, len(images))
            return model(some.repeat(2, 1, 1, 1))[:1] if alone else model(some)

        with _global_state_kept():
            # Untargeted FAB differentiates every logit of one forward pass.
            seen = _only_input_gradients(together, again="fab" in self.attacks)
            runner = self._runner(seen, images, draws.batch_seed())
            found, _ = runner.run_standard_evaluation(images, labels, batch_size=len(images))
        finite = found.flatten(1).isfinite().all(dim=1).view(-1, 1, 1, 1)
        found = torch.where(finite, found, images)  # a step along NaN gives no example
        return NORMS[self.norm].project(found, images, self.epsilon)

    def _runner(self, model: Callable[[Tensor], Tensor], images: Tensor, seed: int) -> Any:
        from pyautoattack import AutoAttack as Runner

        runner = Runner(
            model,  # pyright: ignore[reportArgumentType]  # it needs no more than a callable
            norm=self.norm.capitalize(),  # pyright: ignore[reportArgumentType]
            eps=self.epsilon,
            seed=seed,
            device=images.device,
            version="standard",
        )
        # It warns of randomness, softmax outputs and zero gradients: the report's own checks do.
        quiet = logging.Logger("quiet", level=logging.CRITICAL + 1)
        runner.logger = runner.apgd.logger = runner.apgd_targeted.logger = quiet
        runner.verbose = False
        num_classes = model(images).shape[1]
        runner.attacks_to_run = self._possible(num_classes)
        runner.square.n_queries = self.queries
        for targeted in (runner.apgd_targeted, runner.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, num_classes - 1)
        return runner

    def _possible(self, num_classes: int) -> list[str]:
        instead = {2: {"apgd-t": "apgd-ce", "apgd-dlr": "apgd-ce"}, 3: {"apgd-t": "apgd-dlr"}}
        swaps = instead.get(num_classes, {})
        return list(dict.fromkeys(swaps.get(attack, attack) for attack in self.attacks))
