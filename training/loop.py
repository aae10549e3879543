"""The training of every run: a plain PyTorch loop under accelerate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from attacks.randomness import image_seeds
from data.gather import gather_by_index
from data.loader import Batch, EvaluationLoader, MicroBatch, TrainingLoader, micro_batches
from models.classifier import RobustClassifier
from models.trn import TRN
from training.recipe import RunRecipe
from training.run_folder import RunFolder

Chunk = tuple[Tensor, Tensor, Tensor]
"""Images (B, 3, H, W); labels (B,) or probabilities (B, num_classes); seeds (B,)."""


@dataclass(kw_only=True)
class Training:
    """What a run works with; model and optimizer are accelerate's, the rest is plain."""

    recipe: RunRecipe
    accelerator: Accelerator
    classifier: RobustClassifier
    """The bare RobustClassifier inside `model`."""
    model: nn.Module
    optimizer: Any
    scheduler: Scheduler
    objective: Callable[[nn.Module, RobustClassifier, Chunk], Tensor]
    """The mean loss of `model`, whose bare classifier is given too, on a chunk."""
    validation_attacks: Mapping[str, Callable[..., Tensor]]
    """What is measured each epoch beside clean accuracy: by name, a function from classifier,
    images, labels and seeds to attacked images."""
    train_loader: TrainingLoader
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    repeats_attacks: bool = False
    """Whether an image's seed stays the same in every epoch."""
    keep: Callable[[RobustClassifier], RobustClassifier | TRN] = field(default=lambda model: model)
    """What of the best epoch is written to the run folder."""

    @property
    def evaluated(self) -> RobustClassifier:
        """The model that is validated and kept: the average where there is one."""
        return cast(RobustClassifier, self.ema.module) if self.ema else self.classifier


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that is a function of all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def fit(training: Training, validation: EvaluationLoader, folder: RunFolder) -> None:
    """Train from where the run folder stands, validate, keep the best and the last epoch."""
    accelerator = training.accelerator
    for epoch in range(len(folder.rows), training.recipe.epochs):
        row = {"epoch": epoch + 1, **train_epoch(training, epoch)}
        row |= validate(training, training.evaluated, validation, "val")
        folder.rows.append(row)
        accelerator.log(row, step=epoch + 1)
        if accelerator.is_main_process:
            if folder.best_epoch() == epoch + 1:
                folder.write_best(training.keep(training.evaluated))
            folder.write_metrics()
        folder.save_state(accelerator, training.ema)


def train_epoch(training: Training, epoch: int) -> dict[str, float]:
    """Train on each image once (but for an uneven last batch); mean loss and last learning rate.

    Raises:
        FloatingPointError: the loss is NaN or infinite; the weights are those of the failed step.
    """
    accelerator, loader = training.accelerator, training.train_loader
    loader.set_epoch(epoch)
    training.model.train()
    total = torch.zeros((), device=accelerator.device)
    bar = tqdm(loader, desc=f"epoch {epoch + 1}", disable=not accelerator.is_main_process)
    for step, batch in enumerate(bar):
        # Drop-path and mixing then depend on nothing that came before, such as a resume.
        set_seed(derived_seed(training.recipe.seed, epoch, step, accelerator.process_index))
        draw = 0 if training.repeats_attacks else epoch
        seeds = image_seeds(derived_seed(training.recipe.seed, draw), batch["indices"])
        total += train_step(training, batch, seeds, update=epoch * len(loader) + step)
    loss = float(accelerator.reduce(total, "mean")) / len(loader)  # pyright: ignore[reportArgumentType]
    if not np.isfinite(loss):
        raise FloatingPointError(f"epoch {epoch + 1}: expected a finite loss, found {loss}.")
    return {"train_loss": loss, "lr": training.optimizer.param_groups[0]["lr"]}


def train_step(training: Training, batch: Batch, seeds: Tensor, update: int) -> Tensor:
    """One update of the weights from this process's share of a batch; its mean loss, detached."""
    recipe, accelerator = training.recipe, training.accelerator
    parts = recipe.gradient_accumulation
    total = torch.zeros((), device=accelerator.device)
    columns = (batch["images"], batch["labels"], seeds)
    for images, labels, chunk_seeds in zip(*(each.chunk(parts) for each in columns), strict=True):
        with accelerator.accumulate(training.model):
            images, targets = images.to(accelerator.device), labels.to(accelerator.device)
            if training.mixup:
                images, targets = training.mixup(images, targets)
            with accelerator.autocast():
                chunk = (images, targets, chunk_seeds)
                loss = training.objective(training.model, training.classifier, chunk)
            accelerator.backward(loss)
            if accelerator.sync_gradients and recipe.optimizer.clip_grad:
                accelerator.clip_grad_norm_(training.model.parameters(), recipe.optimizer.clip_grad)
            training.optimizer.step()
            training.optimizer.zero_grad()
        total += loss.detach() / parts
    training.scheduler.step_update(update + 1)
    if training.ema:
        training.ema.update(training.classifier, step=update)
    return total


def validate(
    training: Training, model: nn.Module, loader: EvaluationLoader, split: str
) -> dict[str, float]:
    """Mean loss and accuracy over all processes, each image counted once.

    The same under each of `validation_attacks`, of images that are right without it too.

    Args:
        training: The run.
        model: The bare model to measure, in any mode; left in eval mode.
        loader: This process's share of the images.
        split: Prefix of the names in the result.
    """
    accelerator = training.accelerator
    model.eval()
    rows = list[dict[str, Tensor]]()
    batches = tqdm(
        micro_batches(loader),
        desc=split,
        total=loader.num_micro_batches,
        leave=False,
        disable=not accelerator.is_main_process,
    )
    for batch in batches:
        rows.append(measure(training, model, batch))
    names = rows[0].keys() if rows else ()
    columns = {name: torch.cat([row[name] for row in rows]) for name in names}
    indices = columns.pop("index", torch.empty(0, dtype=torch.int64))
    columns = gather_by_index(accelerator, indices, columns, expected=loader.dataset.indices)
    return {f"{split}_{name}": float(values.mean()) for name, values in columns.items()}


def measure(training: Training, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
    """Index, loss and correctness of each true image of a micro-batch, shape (count,) each."""
    accelerator = training.accelerator
    images, labels = batch["images"].to(accelerator.device), batch["labels"].to(accelerator.device)
    labels = labels.clamp(min=0)  # padding has label -1
    with torch.no_grad(), accelerator.autocast():
        logits = model(images).float()
    result = {
        "index": batch["indices"],
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "accuracy": (logits.argmax(1) == labels).double(),
    }
    for name, attack in training.validation_attacks.items():
        seeds = image_seeds(training.recipe.seed, batch["indices"].clamp(min=0))
        with accelerator.autocast():
            attacked = attack(model, images, labels, seeds)
            with torch.no_grad():
                predictions = model(attacked).argmax(1)
        result[name] = (predictions == labels) * result["accuracy"]  # right without it, too
    return {name: values[: batch["count"]].cpu() for name, values in result.items()}
