"""What a training run works with, and how it is validated and interrupted."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from tqdm import tqdm

from robust_submission.attacks import image_seeds
from robust_submission.attacks.base import correct
from robust_submission.cli.errors import StoppedError, UserError
from robust_submission.data.gather import gather_by_index
from robust_submission.data.loader import (
    EvaluationLoader,
    MicroBatch,
    TrainingLoader,
    micro_batches,
)
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.surgery import evaluating, frozen
from robust_submission.models.trn import TRN
from robust_submission.models.weights import head_of
from robust_submission.training.recipe import RunRecipe


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
    """What the loop works with; model and optimiser are prepared by accelerate at construction."""

    recipe: RunRecipe
    accelerator: Accelerator
    classifier: RobustClassifier
    """The bare classifier inside `model`; sharded over the processes under FSDP."""
    model: nn.Module
    """What the loss is computed with."""
    optimizer: Any
    scheduler: Scheduler
    """Of timm, stepped before each update."""
    objective: Objective
    fall_back: Objective | None = None
    """Replaces `objective` after its robust accuracy has collapsed; None: nothing does."""
    awp_gamma: float = 0.0
    """Size of the adversarial weight perturbation; 0 for none."""
    awp_warmup: int = 0
    """Epochs before the weights are perturbed."""
    freeze_epochs: int = 0
    """Epochs at the start that train the backbone's head alone; not with sharded weights."""
    validation_attacks: Mapping[str, Callable[..., Tensor]]
    """What is measured beside clean accuracy: names of metrics, and functions from classifier,
    images, labels and seeds to attacked images."""
    train_loader: TrainingLoader
    repeats_attacks: bool = False
    """Whether an image has the same seed in every epoch."""
    keep: Callable[[RobustClassifier], RobustClassifier | TRN] = field(default=lambda model: model)
    """The part of the best epoch's model that is written to the run folder."""
    ema: ModelEmaV3 | None = field(init=False, default=None)
    """timm's average of the weights; its decay grows from 0, so that the start is forgotten."""
    whole: RobustClassifier | None = field(init=False, default=None)
    """Receives all weights of a sharded classifier; None if it is not sharded."""

    def __post_init__(self) -> None:
        # Before prepare: it patches the classifier's forward, and a copy would call the original's.
        device, decay = self.accelerator.device, self.recipe.ema_decay
        if decay is not None:
            self.ema = ModelEmaV3(self.classifier, decay=decay, use_warmup=True)
        if is_sharded(self.accelerator):
            # Autocast alone then sets the precision, as without sharding: accelerate's FSDP policy
            # would round the images too, before the attack and GCM, to the 8 bits of bfloat16.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None  # pyright: ignore[reportOptionalMemberAccess]
            self.whole = deepcopy(self.classifier).to(device)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.ema:
            self.ema.to(device)

    @contextmanager
    def training_mode(self, epoch: int) -> Iterator[None]:
        """Set the modes for training an epoch; what it does not train is in eval mode and frozen.

        Weights that are not trained have no gradient: the optimiser leaves them and their momentum
        alone, and their average is the weights themselves.
        """
        self.model.train()
        with ExitStack() as stack:
            if epoch < self.freeze_epochs:
                backbone = self.classifier.backbone
                stack.enter_context(evaluating(backbone))
                stack.enter_context(frozen(backbone))
                head_of(backbone).train().requires_grad_(True)
            yield

    def trained_model(self, epoch: int) -> nn.Module:
        """What the loss is computed with in an epoch: a parallel wrapper expects a gradient for
        every weight, so that the head alone is trained without; see `average_gradients`."""
        return self.classifier if epoch < self.freeze_epochs else self.model

    def average_gradients(self, epoch: int) -> None:
        """Average the gradients over the processes where no parallel wrapper did."""
        if epoch < self.freeze_epochs:
            for weight in self.classifier.parameters():
                if weight.grad is not None:
                    weight.grad = cast(Tensor, self.accelerator.reduce(weight.grad, "mean"))

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

    def validate(self, model: nn.Module, loader: EvaluationLoader, split: str) -> dict[str, float]:
        """Mean loss and accuracy over all processes, each image counted once.

        For each of `validation_attacks` also the share of images that are classified correctly both
        clean and attacked.

        Args:
            model: The bare model to measure, in any mode; left in eval mode.
            loader: This process's share of the images.
            split: Prefix of the names in the result.
        """
        model.eval()
        for buffer in model.buffers():  # batch norm's statistics differ by process: use the first's
            broadcast(buffer)
        batches = tqdm(
            micro_batches(loader),
            desc=split,
            total=loader.num_micro_batches,
            leave=False,
            disable=not self.accelerator.is_main_process,
        )
        rows = [self._measure(model, batch) for batch in batches]
        columns = {name: torch.cat([row[name] for row in rows]) for name in (rows or [{}])[0]}
        indices = columns.pop("index", torch.empty(0, dtype=torch.int64))
        columns = gather_by_index(
            self.accelerator, indices, columns, expected=loader.dataset.indices
        )
        return {f"{split}_{name}": float(values.mean()) for name, values in columns.items()}

    def _measure(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Index, loss and correctness of each image of a micro-batch without padding, (count,)."""
        device, autocast = self.accelerator.device, self.accelerator.autocast
        images, labels = batch["images"].to(device), batch["labels"].to(device)
        labels = labels.clamp(min=0)  # padding has label -1
        with torch.no_grad(), autocast():
            logits = model(images).float()
        result = {
            "index": batch["indices"],
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": correct(logits, labels).cpu().double(),  # Apple's GPUs have no float64
        }
        for name, attack in self.validation_attacks.items():
            seeds = image_seeds(self.recipe.seed, batch["indices"].clamp(min=0))
            with autocast():
                attacked = attack(model, images, labels, seeds)
                with torch.no_grad():
                    withstood = correct(model(attacked), labels)
            result[name] = withstood.cpu() * result["accuracy"]
        return {name: values[: batch["count"]].cpu() for name, values in result.items()}


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether accelerate shards the weights over the processes (FSDP2)."""
    return accelerator.distributed_type == DistributedType.FSDP


def require_whole_weights(accelerator: Accelerator, option: str) -> None:
    """Raise UserError if the weights are sharded and an option needs them whole."""
    if is_sharded(accelerator):
        raise UserError(
            f"{option}: expected whole weights in each process, found sharded ones (FSDP); "
            "use training/accelerate/many_gpus.yaml."
        )


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
        self._raises = False
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
        if self._raises:
            self._raises = False  # one is enough
            raise StoppedError(number)

    def after_step(self) -> int:
        """The signal for which all processes stop here, or 0. Each calls it after each step.

        Several processes exchange what they received, and read the exchange of the step before, so
        that none waits for another.
        """
        if self.accelerator.num_processes == 1:
            return self._received
        result, self._pending = self._pending, self._largest()
        return 0 if result is None else int(result)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise StoppedError in the block where a signal comes, as it may take minutes.

        In one process only: several have to stop at the same place.
        """
        self._raises = self.accelerator.num_processes == 1
        try:
            yield
        finally:
            self._raises = False

    def now(self) -> int:
        """The same, including signals received in this step; waits for device and processes."""
        return int(self._largest())

    def _largest(self) -> Tensor:
        received = torch.full((), self._received, device=self.accelerator.device)
        largest = self.accelerator.reduce(received, "max")
        assert isinstance(largest, Tensor)
        return largest
