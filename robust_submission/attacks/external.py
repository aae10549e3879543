"""Attacks by well-kept libraries, as callables like our own: Carlini & Wagner, AutoAttack.

The libraries call `backward` and seed the global generators; here neither leaves a trace.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from robust_submission.attacks.base import (
    Model,
    check_at_least,
    check_batch,
    check_choice,
    check_differentiable,
    differentiable,
    ordinary,
)
from robust_submission.attacks.hyperplane import nearest_l2, nearest_linf
from robust_submission.attacks.norms import NORMS
from robust_submission.cli.errors import UserError


class _InputGradient(torch.autograd.Function):
    """The model with a graph of its own: backward reaches the images, never a parameter.

    The first backward pass frees what the graph holds, unless others are to follow (`again`).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: Model, again: bool) -> Tensor:
        ctx.again = again
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            ctx.logits = model(ctx.images).float()
        check_differentiable(ctx.logits.requires_grad)
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = torch.autograd.grad(
            ctx.logits, ctx.images, outputs, retain_graph=ctx.again, allow_unused=True
        )
        check_differentiable(gradient is not None)
        return gradient.nan_to_num(), None, None


def _only_input_gradients(model: Model, *, again: bool = False) -> Callable[[Tensor], Tensor]:
    def call(images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            return _InputGradient.apply(images, model, again)  # pyright: ignore[reportReturnType]
        with torch.no_grad():
            return model(images).float()

    return call


class _Hidden(nn.Module):
    """A module that carries the model without owning it: nobody moves it or changes its mode."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, images: Tensor) -> Tensor:
        return self.call(images)


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """Give back the global random state and the tracing function (pyautoattack resets it)."""
    trace = sys.gettrace()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        sys.settrace(trace)


def _fast_projections() -> AbstractContextManager[object]:
    """Let FAB find the nearest points of hyperplanes without sorting: the same ones, sooner."""
    return patch.multiple(
        "pyautoattack.fab_base", projection_linf=nearest_linf, projection_l2=nearest_l2
    )


def _batch_seed(seed: int, generator: torch.Generator | None, seeds: Tensor | None) -> int:
    if seeds is not None and generator is not None:
        raise UserError("Expected either a generator or seeds. Received: both.")
    if seeds is not None:
        return int(sum(seeds.tolist()) % 2**31)
    if generator is not None:
        return int(torch.randint(2**31, (), generator=generator, device=generator.device))
    return seed


@dataclass(frozen=True, kw_only=True)
class CarliniWagner:
    """Carlini & Wagner's L2 attack (2017) by foolbox: the least perturbation that fools.

    Where the least one found is longer than `epsilon`, it is cut to that length; where none is
    found, the image comes back as it was. Nothing in it is random. It takes up to
    binary_search_steps x steps forward and backward passes.
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
    1,000 steps at 0.01 find (measured, targeted and not, on a small model of digits)."""

    initial_const: float = 0.1
    """First weight tried; ten times more wherever it fails."""

    confidence: float = 0.0
    """How far beyond the decision an example must lie, in logits."""

    targeted: bool = False
    """Labels are the wanted classes."""

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ["l2"])
        check_at_least("epsilon", self.epsilon, 0)
        check_at_least("binary_search_steps", self.binary_search_steps, 1)
        check_at_least("steps", self.steps, 1)
        check_at_least("step_size", self.step_size, 0)
        check_at_least("initial_const", self.initial_const, 0)
        check_at_least("confidence", self.confidence, 0)

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch: see `Attack`. The generator and the seeds are not needed."""
        # foolbox takes seconds to import: only for those who use it.
        from foolbox.attacks.carlini_wagner import L2CarliniWagnerAttack
        from foolbox.criteria import Misclassification, TargetedMisclassification
        from foolbox.models.pytorch import PyTorchModel

        check_batch(images, labels)
        with differentiable():
            images, labels = ordinary(images), ordinary(labels)
            if self.epsilon == 0 or len(images) == 0:
                return images.clone()
            criterion = TargetedMisclassification if self.targeted else Misclassification
            hidden = _Hidden(_only_input_gradients(model)).eval()
            attack = L2CarliniWagnerAttack(
                binary_search_steps=self.binary_search_steps,
                steps=self.steps,
                stepsize=self.step_size,
                confidence=self.confidence,
                initial_const=self.initial_const,
                abort_early=False,  # it looks at the losses of the batch as one
            )
            seen = PyTorchModel(hidden, bounds=(0, 1), device=images.device)
            least = attack.run(seen, images, criterion(labels)).detach()
            found = (least != 0).any(dim=(1, 2, 3), keepdim=True)  # foolbox gives zeros for none
            return NORMS["l2"].project(torch.where(found, least, images), images, self.epsilon)


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack by its authors (Croce & Hein 2020), with the settings of their standard version.

    FAB finds the nearest points of hyperplanes by `attacks.hyperplane`, all else is theirs. Its
    draws depend on the whole batch: for the same result give the same batch. An image that no
    attack fools comes back as it was. With three classes or two there is no targeted DLR loss:
    APGD-T then gives way to untargeted DLR, or, with two, to APGD-CE, where it is the same thing.
    """

    STANDARD: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-t", "fab-t", "square")
    KNOWN: ClassVar[tuple[str, ...]] = (*STANDARD, "apgd-dlr", "fab")

    norm: str = "linf"
    """The ball: "linf", "l2" or "l1"."""

    epsilon: float = 8 / 255
    """The ball's radius, in units of the 0-to-1 image; at 0 images come back bit for bit."""

    attacks: tuple[str, ...] = STANDARD
    """Which attacks, in turn, each on the images that withstood the ones before."""

    queries: int = 5000
    """Forward passes that Square may make."""

    seed: int = 0
    """Of the random draws, where the call brings neither generator nor seeds."""

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ["linf", "l2", "l1"])
        check_at_least("epsilon", self.epsilon, 0)
        check_at_least("queries", self.queries, 1)
        if not self.attacks or isinstance(self.attacks, str):
            raise UserError(f"Expected a tuple of attacks. Received: {self.attacks!r}.")
        for attack in self.attacks:
            check_choice("attacks", attack, self.KNOWN)

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch: see `Attack`. Generator and seeds make one seed for the whole batch."""
        check_batch(images, labels)
        seed = _batch_seed(self.seed, generator, seeds)
        with differentiable(), _global_state_kept(), _fast_projections():
            images, labels = ordinary(images).contiguous(), ordinary(labels)
            if self.epsilon == 0 or len(images) == 0:
                return images.clone()
            # FAB untargeted differentiates every logit of one forward pass.
            seen = _only_input_gradients(model, again="fab" in self.attacks)
            runner = self._runner(seen, images, seed)
            found, _ = runner.run_standard_evaluation(images, labels, batch_size=len(images))
            # A step along NaN is no example.
            whole = found.isfinite().all(dim=1, keepdim=True).all(dim=2, keepdim=True)
            found = torch.where(whole.all(dim=3, keepdim=True), found, images)
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
        # Its warnings (randomness, softmax outputs, zero gradients) are the report's own checks.
        quiet = logging.Logger("quiet", level=logging.CRITICAL + 1)
        runner.logger = runner.apgd.logger = runner.apgd_targeted.logger = quiet
        runner.verbose = False
        num_classes = model(images[:1]).shape[1]
        runner.attacks_to_run = self._possible(num_classes)
        runner.square.n_queries = self.queries
        for targeted in (runner.apgd_targeted, runner.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, num_classes - 1)
        return runner

    def _possible(self, num_classes: int) -> list[str]:
        instead = {2: {"apgd-t": "apgd-ce", "apgd-dlr": "apgd-ce"}, 3: {"apgd-t": "apgd-dlr"}}
        swaps = instead.get(num_classes, {})
        return list(dict.fromkeys(swaps.get(attack, attack) for attack in self.attacks))
