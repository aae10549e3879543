"""The training of every run: a plain PyTorch loop under accelerate."""

import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from robust_submission.attacks.base import image_seeds
from robust_submission.cli.errors import StoppedError
from robust_submission.data.loader import Batch, EvaluationLoader
from robust_submission.models.classifier import RobustClassifier
from robust_submission.training.epoch_losses import EpochLosses
from robust_submission.training.interruption import Interruption
from robust_submission.training.memory import with_room
from robust_submission.training.overfitting import collapse_warning, collapsed_epoch
from robust_submission.training.run_folder import RunFolder, best_epoch
from robust_submission.training.state import Examples, Objective, Training, derived_seed
from robust_submission.training.validation import validate


def fit(training: Training, validation: EvaluationLoader, folder: RunFolder) -> None:
    """Train from where the run folder stands, validate, keep the best and the last epoch.

    Raises:
        StoppedError: SIGTERM or SIGINT came; the state is saved.
        UserError: a loss or weight is NaN or infinite; the last state is one before that.
        UserError: see `with_room`.
    """
    accelerator = training.accelerator
    if folder.rows and not len(folder.losses):  # a crash may have come between state and best
        evaluated = training.evaluated()
        if accelerator.is_main_process:
            keep_best(training, evaluated, folder)
    with Interruption(accelerator) as interruption:
        for epoch in range(len(folder.rows), training.recipe.epochs):
            row = {"epoch": epoch + 1, **train_epoch(training, folder, interruption)}
            evaluated = training.evaluated()
            row |= validate(training, evaluated, validation, "val")
            folder.add_row(row)
            accelerator.log(row, step=epoch + 1)
            folder.save_state(accelerator, training.ema)
            if accelerator.is_main_process:
                keep_best(training, evaluated, folder)
                if warning := collapse_warning(folder.rows, falls_back=bool(training.fall_back)):
                    print(warning, file=sys.stderr)
            if number := interruption.up_to_now():
                stop(training, number, f"epoch {epoch + 1}")


def keep_best(training: Training, evaluated: RobustClassifier, folder: RunFolder) -> None:
    """Write the metrics, and what the last epoch left where it is the best. The main process."""
    if best_epoch(folder.rows) == len(folder.rows):
        folder.write_best(training.keep(evaluated))
    folder.write_metrics()


def stop(training: Training, number: int, place: str) -> None:
    """End the run for a signal, behind a state that was saved at this place."""
    accelerator = training.accelerator
    if accelerator.is_main_process:
        name = signal.Signals(number).name
        tqdm.write(f"{name}: stopped after {place}; go on with --resume.", file=sys.stderr)
    accelerator.wait_for_everyone()  # a launcher ends the others when the first has ended
    accelerator.end_training()  # the trackers write what they hold
    raise StoppedError(number)


def objective_after(training: Training, rows: list[dict[str, float]]) -> Objective:
    """What is minimised after epochs with these metrics: a function of the metrics alone."""
    if training.fall_back and collapsed_epoch(rows):
        return training.fall_back
    return training.objective


def train_epoch(
    training: Training, folder: RunFolder, interruption: Interruption
) -> dict[str, float]:
    """Train on each image once (but for an uneven last batch); mean loss and last learning rate.

    The rate is that of the last step, of the layers that have the largest. Begins where the run
    folder's last state stands within the epoch.
    """
    accelerator, loader = training.accelerator, training.train_loader
    epoch, save_steps = len(folder.rows), training.recipe.save_steps
    objective = objective_after(training, folder.rows)
    losses = EpochLosses(folder, len(loader), accelerator)
    loader.set_epoch(epoch, losses.start)
    training.model.train()
    show = partial(tqdm, desc=f"epoch {epoch + 1}", disable=not accelerator.is_main_process)
    for batch in show(loader, initial=losses.start, total=len(loader)):
        loss = train_step(training, objective, batch, (epoch, losses.done))
        losses.add(loss, largest_rate(training), training.classifier)
        done, last = losses.done, losses.done == len(loader)
        number = interruption.up_to_now() if last else interruption.after_step()
        if number or (save_steps and (last or done % save_steps == 0)):
            losses.check(training.classifier)
            folder.save_state(accelerator, training.ema, losses.values[:done])
        if number:
            stop(training, number, f"epoch {epoch + 1}, step {done} of {len(loader)}")
    losses.check(training.classifier)
    loss = float(accelerator.reduce(losses.mean(), "mean"))  # pyright: ignore[reportArgumentType]
    return {"train_loss": loss, "lr": largest_rate(training)}


def largest_rate(training: Training) -> float:
    """The learning rate of the last step; with layer decay, that of the head."""
    return max(group["lr"] for group in training.optimizer.param_groups)


def train_step(
    training: Training, objective: Objective, batch: Batch, place: tuple[int, int]
) -> Tensor:
    """One update of the weights from this process's share of a batch; its mean loss, detached.

    Args:
        training: The run.
        objective: What is minimised.
        batch: The images.
        place: Epoch and step, both from 0.
    """
    recipe, accelerator, (epoch, step) = training.recipe, training.accelerator, place
    draw = 0 if training.repeats_attacks else epoch
    seeds = image_seeds(derived_seed(recipe.seed, draw), batch["indices"])
    update = epoch * len(training.train_loader) + step

    def gradients() -> Tensor:
        # Drop-path and mixing then depend on nothing that came before, such as a resume.
        set_seed(derived_seed(recipe.seed, epoch, step, accelerator.process_index))
        columns = (batch["images"], batch["labels"], seeds)
        return accumulate(training, objective, columns, update)

    loss = with_room(training, len(seeds), gradients)
    if recipe.optimizer.clip_grad:
        accelerator.clip_grad_norm_(training.model.parameters(), recipe.optimizer.clip_grad)
    training.scheduler.step_update(update)
    training.optimizer.step()
    training.optimizer.zero_grad()
    if training.ema:
        training.ema.update(training.gathered(), step=update)
    return loss


def accumulate(
    training: Training, objective: Objective, columns: tuple[Tensor, ...], update: int
) -> Tensor:
    """Add up the gradients of the parts of a process's share; its mean loss, detached."""
    accelerator = training.accelerator
    parts = accelerator.gradient_accumulation_steps
    accelerator.step = 0  # of the accumulation, whose parts a resumed run may have set anew
    total = torch.zeros((), device=accelerator.device)
    for chunk in zip(*(each.chunk(parts) for each in columns), strict=True):
        with accelerator.accumulate(training.model):
            total += backward(training, objective, chunk, update) / parts
    return total


def backward(
    training: Training, objective: Objective, chunk: tuple[Tensor, ...], update: int
) -> Tensor:
    """Add the gradient of a chunk's mean loss; that loss, detached."""
    accelerator, (images, labels, seeds) = training.accelerator, chunk
    # From the loader's pinned memory: the CPU does not wait for what a GPU still computes.
    images, labels = (each.to(accelerator.device, non_blocking=True) for each in (images, labels))
    with accelerator.autocast():
        examples = objective.examples(training.classifier, (images, labels, seeds))
    with perturbation(training, objective, examples, update):
        with accelerator.autocast():
            loss = objective.loss(training.model, examples)
        accelerator.backward(loss)
    return loss.detach()


def perturbation(
    training: Training, objective: Objective, examples: Examples, update: int
) -> AbstractContextManager[None]:
    """The block in which the weights are perturbed against the loss of the examples, if at all."""
    perturb, accelerator = training.perturbation, training.accelerator
    if perturb is None or update < perturb.first_update:
        return nullcontext()

    def loss(classifier: nn.Module) -> Tensor:
        with accelerator.autocast():
            value = objective.loss(classifier, examples)
        # As the update's: the gradients of whole layers would vanish in float16.
        return value if accelerator.scaler is None else accelerator.scaler.scale(value)

    mean = partial(accelerator.reduce, reduction="mean")
    return perturb(training.classifier, loss, mean)  # pyright: ignore[reportArgumentType]
