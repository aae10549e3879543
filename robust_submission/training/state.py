"""What a training run works with: model, optimiser, schedule, average of the weights."""

import signal
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import SGD, Adam, Optimizer

from robust_submission.cli.errors import UserError
from robust_submission.data.loader import TrainingLoader
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.trn import TRN
from robust_submission.training.recipe import OptimizerConfig, RunRecipe
from robust_submission.training.validation import ValidationAttacks


class Objective(Protocol):
    """What is minimised, in two steps, so that the weights can be perturbed between them."""

    def examples(
        self, classifier: RobustClassifier, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> tuple[Tensor, ...]:
        """Make what the loss needs, such as adversarial examples of the bare classifier.

        Args:
            classifier: The bare classifier, not a parallel wrapper around it.
            images: (B, 3, H, W), float32, RGB, 0 to 1.
            labels: (B,), int64.
            seeds: (B,), int64, one seed per image.
        """
        ...

    def loss(self, model: nn.Module, examples: tuple[Tensor, ...]) -> Tensor:
        """The mean loss, by one forward pass of `model`: the classifier, or a parallel wrapper."""
        ...


@dataclass(kw_only=True)
class Training:
    """What the loop works with; `model` and `optimizer` are prepared by accelerate."""

    recipe: RunRecipe
    accelerator: Accelerator
    classifier: RobustClassifier
    """The bare classifier inside `model`; sharded over the processes under FSDP."""
    model: nn.Module
    optimizer: Any
    scheduler: Scheduler
    objective: Objective
    fall_back: Objective | None = None
    """Replaces `objective` after its robust accuracy has collapsed; None: nothing does."""
    awp_gamma: float = 0.0
    """Size of the adversarial weight perturbation; 0 for none."""
    awp_warmup: int = 0
    """Epochs before the weights are perturbed."""
    validation_attacks: ValidationAttacks
    """What validation measures beside clean accuracy."""
    train_loader: TrainingLoader
    ema: ModelEmaV3 | None = None
    whole: RobustClassifier | None = None
    """Receives all weights of a sharded classifier; None if it is not sharded."""
    repeats_attacks: bool = False
    """Whether an image has the same seed in every epoch."""
    keep: Callable[[RobustClassifier], RobustClassifier | TRN] = field(default=lambda model: model)
    """The part of the best epoch's model that is written to the run folder."""

    def gathered(self) -> RobustClassifier:
        """The classifier with all its weights in this process. All processes must call it."""
        if self.whole is None:
            return self.classifier
        options = StateDictOptions(full_state_dict=True)
        self.whole.load_state_dict(get_model_state_dict(self.classifier, options=options))
        return self.whole

    def evaluated(self) -> RobustClassifier:
        """The model that is validated and kept: the average if there is one. See `gathered`."""
        return cast(RobustClassifier, self.ema.module) if self.ema else self.gathered()


def build_optimizer(config: OptimizerConfig, trained: nn.Module) -> Optimizer:
    """timm's optimiser, with its parameter groups for weight decay and layer decay.

    Adam, AdamW and SGD update all weights in one fused kernel.

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
    return optimizer


def build_scheduler(recipe: RunRecipe, optimizer: Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped before each update.

    Raises:
        UserError: timm has no such schedule, or it needs the metrics of each epoch (plateau).
    """
    config, scheduler, reason = recipe.optimizer, None, ""
    if config.schedule != "plateau":
        try:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=config.schedule,
                num_epochs=recipe.epochs,
                warmup_epochs=config.warmup_epochs,  # pyright: ignore[reportArgumentType]
                warmup_lr=0,
                min_lr=config.min_lr,
                step_on_epochs=False,
                updates_per_epoch=updates_per_epoch,
            )
        except (ValueError, AssertionError) as error:
            reason = f": {error}"
    if scheduler is None:
        expected = "a timm schedule other than plateau"
        raise UserError(
            f"optimizer.schedule: expected {expected}, found {config.schedule}{reason}."
        )
    return scheduler


def build_average(recipe: RunRecipe, classifier: RobustClassifier) -> ModelEmaV3 | None:
    """timm's average of the weights; its decay grows from 0, so that the start is forgotten."""
    if recipe.ema_decay is None:
        return None
    return ModelEmaV3(classifier, decay=recipe.ema_decay, use_warmup=True)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether accelerate shards the weights over the processes (FSDP2)."""
    return accelerator.distributed_type == DistributedType.FSDP


def whole_copy(accelerator: Accelerator, classifier: RobustClassifier) -> RobustClassifier | None:
    """A copy that can hold all weights of a classifier to be sharded; None if it will not be.

    Autocast alone then sets the precision, as without sharding: accelerate's FSDP policy would
    round the images too, before the attack and GCM, to the 8 bits of bfloat16.
    """
    if not is_sharded(accelerator):
        return None
    accelerator.state.fsdp_plugin.mixed_precision_policy = None  # pyright: ignore[reportOptionalMemberAccess]
    return deepcopy(classifier).to(accelerator.device)


def require_whole_weights(accelerator: Accelerator, option: str) -> None:
    """Raise UserError if the weights are sharded and an option needs them whole."""
    if is_sharded(accelerator):
        raise UserError(
            f"{option}: expected whole weights in each process, found sharded ones (FSDP); "
            "use training/accelerate/many_gpus.yaml."
        )


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that is a function of all arguments."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Interruption:
    """Catches SIGINT and SIGTERM in any process, so that all of them stop after the same step.

        with Interruption(accelerator) as interruption:
            for batch in loader:
                step(batch)
                if interruption.after_step(): ...

    A second signal changes nothing: a launcher and a scheduler may both send one.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._received = 0
        self._pending: Tensor | None = None
        self._former = dict[signal.Signals, Any]()

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = max(self._received, number)

    def after_step(self) -> int:
        """The signal for which all processes stop here, or 0. Each calls it after each step.

        Several processes exchange what they received, and read the exchange of the step before,
        whose result is there without waiting for the device.
        """
        if self.accelerator.num_processes == 1:
            return self._received
        result, self._pending = self._pending, self._largest()
        return 0 if result is None else int(result)

    def now(self) -> int:
        """The same, including signals received in this step; waits for device and processes."""
        return int(self._largest())

    def _largest(self) -> Tensor:
        received = torch.full((), self._received, device=self.accelerator.device)
        largest = self.accelerator.reduce(received, "max")
        assert isinstance(largest, Tensor)
        return largest
