"""The optimiser and its schedule: timm's, with what they lack on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.optim.muon import (
    _COEFFICIENTS,
    Muon,
    _is_suitable_for_muon,
    get_lr_scale,
    resolve_ns_coefficients,
    zeropower_via_newtonschulz,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from robust_submission.cli.errors import UserError, log
from robust_submission.runtime import multiplies_bfloat16
from robust_submission.training.recipe import OptimizerConfig, RunRecipe


class Float32Muon(Muon):
    """timm's Muon in float32, for CPUs on which bfloat16 is a hundred times slower.

    timm has the precision as an argument of the iteration (`zeropower_via_newtonschulz`), but not
    of the optimiser. The result is the same within bfloat16's rounding.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update matrices and convolutions here, and all other weights as timm does, by AdamW."""
        weights = [(each, group) for group in self.param_groups for each in group["params"]]
        gradients = dict[Tensor, Tensor]()
        for weight, _ in weights:
            if weight.grad is not None and _is_suitable_for_muon(weight):
                gradients[weight], weight.grad = weight.grad, None
        loss = super().step(closure)
        for weight, group in weights:
            if weight in gradients:
                weight.grad = gradients[weight]
                self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum, lr = self.state[weight], group["momentum"], group["lr"]
        average = state.setdefault("momentum_buffer", torch.zeros_like(weight))
        average.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum) if group["nesterov"] else average
        direction = zeropower_via_newtonschulz(
            update.flatten(1),
            group["ns_steps"],
            resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS),
            eps=group["eps"],
            safety_factor=group["safety_factor"],
            dtype=torch.float32,
        )
        scale = get_lr_scale(direction.shape, group["adjust_lr_fn"])
        weight.mul_(1 - lr * group["weight_decay"])
        weight.add_(direction.view_as(weight), alpha=-lr * scale)


def build_optimizer(config: OptimizerConfig, trained: nn.Module) -> Optimizer:
    """timm's optimiser, with its parameter groups for weight decay and layer decay.

    Adam, AdamW and SGD update all weights in one fused kernel. Muon computes in float32 where the
    processor lacks bfloat16.

    Raises:
        UserError: timm has no such optimiser, or it needs second-order gradients or a package or
            device that is missing.
    """
    try:
        optimizer = create_optimizer_v2(
            trained,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
    except (ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise UserError(
            f"optimizer: expected one that timm can build, found {config.name}: {error}"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"optimizer.name: expected a first-order optimiser, found {config.name}.")
    if isinstance(optimizer, Adam | SGD):  # AdamW is an Adam
        for group in optimizer.param_groups:
            group["fused"] = True
    if config.name in ("muon", "nmuon") and not multiplies_bfloat16():
        optimizer = Float32Muon(optimizer.param_groups, **optimizer.defaults)
    return optimizer


def build_scheduler(recipe: RunRecipe, optimizer: Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped before each update.

    Raises:
        UserError: timm has no such schedule, or it needs the metrics of each epoch (plateau).
    """
    config, scheduler, reason = recipe.optimizer, None, ""
    if config.warmup_epochs >= recipe.epochs:
        rises = f"the learning rate rises for {config.warmup_epochs:g} epochs"
        log.warning("optimizer.warmup_epochs: %s, and the run has %d.", rises, recipe.epochs)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.schedule,
            num_epochs=recipe.epochs,
            warmup_epochs=config.warmup_epochs,  # pyright: ignore[reportArgumentType]
            warmup_lr=0,
            min_lr=config.min_lr,
            # timm's own are for 300 epochs.
            decay_epochs=0.3 * recipe.epochs if config.schedule == "step" else None,  # pyright: ignore[reportArgumentType]
            decay_milestones=[share * recipe.epochs for share in (0.3, 0.6, 0.9)],  # pyright: ignore[reportArgumentType]
            decay_rate=1.0 if config.schedule == "poly" else 0.1,  # its power
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        reason = f": {error}"
    if scheduler is None or config.schedule == "plateau":
        expected, found = "a timm schedule other than plateau", f"{config.schedule}{reason}"
        raise UserError(f"optimizer.schedule: expected {expected}, found {found}.")
    return scheduler
