"""The training of every run: a plain PyTorch loop under accelerate."""

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from attacks.randomness import image_seeds
from data.gather import gather_by_index
from data.loader import Batch, EvaluationLoader, MicroBatch, micro_batches
from training.overfitting import collapse_warning, collapsed_epoch
from training.parts import Examples, Objective, Training, derived_seed
from training.run_folder import RunFolder


def fit(training: Training, validation: EvaluationLoader, folder: RunFolder) -> None:
    """Train from where the run folder stands, validate, keep the best and the last epoch."""
    accelerator = training.accelerator
    for epoch in range(len(folder.rows), training.recipe.epochs):
        objective = objective_after(training, folder.rows)
        row = {"epoch": epoch + 1, **train_epoch(training, objective, epoch)}
        row |= validate(training, training.evaluated, validation, "val")
        folder.rows.append(row)
        accelerator.log(row, step=epoch + 1)
        if accelerator.is_main_process:
            if folder.best_epoch() == epoch + 1:
                folder.write_best(training.keep(training.evaluated))
            folder.write_metrics()
            if warning := collapse_warning(folder.rows, falls_back=bool(training.fall_back)):
                print(warning, file=sys.stderr)
        folder.save_state(accelerator, training.ema)


def objective_after(training: Training, rows: list[dict[str, float]]) -> Objective:
    """What is minimised after epochs with these metrics: a function of the metrics alone."""
    if training.fall_back and collapsed_epoch(rows):
        return training.fall_back
    return training.objective


def train_epoch(training: Training, objective: Objective, epoch: int) -> dict[str, float]:
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
        total += train_step(training, objective, (batch, seeds), update=epoch * len(loader) + step)
    loss = float(accelerator.reduce(total, "mean")) / len(loader)  # pyright: ignore[reportArgumentType]
    if not np.isfinite(loss):
        raise FloatingPointError(f"epoch {epoch + 1}: expected a finite loss, found {loss}.")
    return {"train_loss": loss, "lr": training.optimizer.param_groups[0]["lr"]}


def train_step(
    training: Training, objective: Objective, batch: tuple[Batch, Tensor], update: int
) -> Tensor:
    """One update of the weights from this process's share of a batch; its mean loss, detached.

    Args:
        training: The run.
        objective: What is minimised.
        batch: The images and their seeds.
        update: How many updates came before.
    """
    recipe, accelerator = training.recipe, training.accelerator
    parts = recipe.gradient_accumulation
    total = torch.zeros((), device=accelerator.device)
    columns = (batch[0]["images"], batch[0]["labels"], batch[1])
    for images, labels, seeds in zip(*(each.chunk(parts) for each in columns), strict=True):
        with accelerator.accumulate(training.model):
            images, targets = images.to(accelerator.device), labels.to(accelerator.device)
            if training.mixup:
                images, targets = training.mixup(images, targets)
            with accelerator.autocast():
                examples = objective.examples(training.classifier, (images, targets, seeds))
            with perturbation(training, objective, examples, update):
                with accelerator.autocast():
                    loss = objective.loss(training.model, examples)
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


def perturbation(
    training: Training, objective: Objective, examples: Examples, update: int
) -> AbstractContextManager[None]:
    """The block in which the weights are perturbed against the loss of the examples, if at all."""
    perturb, accelerator = training.perturbation, training.accelerator
    if perturb is None or update < perturb.first_update:
        return nullcontext()

    def loss(classifier: nn.Module) -> Tensor:
        with accelerator.autocast():
            return objective.loss(classifier, examples)

    mean = partial(accelerator.reduce, reduction="mean")
    return perturb(training.classifier, loss, mean)  # pyright: ignore[reportArgumentType]


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
