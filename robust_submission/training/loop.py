"""The training loop of every run: plain PyTorch under accelerate."""

import signal
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from robust_submission.attacks import image_seeds
from robust_submission.cli.errors import StoppedError, UserError, log
from robust_submission.data.dataset import Batch
from robust_submission.data.loader import EvaluationLoader
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.weights import load_weights
from robust_submission.runtime import multiplies_bfloat16, start_accelerator
from robust_submission.training.data import TrainingData
from robust_submission.training.objectives import (
    ROBUST_ACCURACY,
    Challenge,
    MixedCrossEntropy,
    collapsed_epoch,
    perturbed_weights,
)
from robust_submission.training.recipe import RunRecipe, require
from robust_submission.training.run_folder import RunFolder, best_epoch
from robust_submission.training.state import Interruption, Objective, Training

CHECK_STEPS = 50
"""Steps between two checks for NaN, each of which waits for the device."""

SomeRecipe = TypeVar("SomeRecipe", bound=RunRecipe)


def run_training(
    recipe: SomeRecipe,
    build: Callable[[SomeRecipe, Accelerator], tuple[Training, TrainingData]],
    report: Callable[[Training, TrainingData, RunFolder], None] | None = None,
) -> None:
    """Train what `build` makes of the recipe, leave a run folder, and call `report`.

    Raises:
        UserError: The recipe asks for what does not exist or does not go together; see also `fit`.
        StoppedError: SIGTERM or SIGINT was received, and the state is saved.
    """
    accelerator, folder = start_run(recipe)
    try:
        training, data = build(recipe, accelerator)
        folder.begin(accelerator, training.ema, data.identity())
        fit(training, data.validation, folder)
        if report:
            report(training, data, folder)
    except BaseException:
        for tracker in accelerator.trackers:
            with suppress(OSError):  # the folder may be gone
                tracker.finish()
        raise
    accelerator.end_training()


def start_run(recipe: RunRecipe) -> tuple[Accelerator, RunFolder]:
    """Start accelerate and open the run folder.

    Raises:
        UserError: See `RunFolder`; or the device does not have the mixed precision, a tracker is
            not installed, or there are several processes with `auto_batch_size`.
    """
    trackers = ["all", *map(str, get_available_trackers())]
    for name in recipe.trackers:
        expected = f"installed trackers (here {', '.join(trackers)})"
        require(name in trackers, "trackers", expected, name)
    accelerator = start_accelerator(
        float64=vars(recipe).get("trn") is not None,  # for its gradient map
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        log_with=list(recipe.trackers) or None,
        project_dir=recipe.output,
    )
    count, device = accelerator.num_processes, accelerator.device.type
    alone = count == 1 or not recipe.auto_batch_size
    require(alone, "auto_batch_size", "one process", f"{count}; set gradient_accumulation")
    holds = recipe.mixed_precision == "no" or accelerator.native_amp
    require(holds, "mixed_precision", f"no or bf16 on {device}", "fp16")
    if recipe.mixed_precision == "bf16" and not multiplies_bfloat16():
        log.warning("mixed_precision: this CPU is many times slower in bf16; set it to no.")
    with accelerator.main_process_first():  # the others find the folder that it makes
        folder = RunFolder(recipe, is_main=accelerator.is_main_process)
    return accelerator, folder


def summarize(training: Training, data: TrainingData, folder: RunFolder) -> None:
    """Measure the best epoch on the test images; write summary.json and print it."""
    best = best_epoch(folder.rows)
    summary: dict[str, object] = {"best_epoch": best, **folder.rows[best - 1]}
    if training.accelerator.is_main_process:  # whatever happens to the test images
        folder.write_json("summary.json", summary)
    if data.test is not None:  # a loader is false where a process has no share
        classifier = training.whole or training.classifier
        load_weights(classifier, folder.path / SAFETENSORS_SINGLE_FILE)
        try:
            summary |= training.validate(classifier, data.test, "test")
        except UserError:
            log.warning("%s: trained, but not tested; mend the data and evaluate it.", folder.path)
            raise
    if not training.accelerator.is_main_process:
        return
    folder.write_json("summary.json", summary)
    table = Table("figure", str(folder.path), title=f"best of {len(folder.rows)} epochs")
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def fit(training: Training, validation: EvaluationLoader, folder: RunFolder) -> None:
    """Train from the run folder's last state on; validate, keep the best and the last epoch.

    Raises:
        StoppedError: SIGTERM or SIGINT was received, and the state is saved.
        UserError: A loss or a weight is NaN or infinite, and the last saved state is from before;
            or a step does not fit in memory.
    """
    accelerator = training.accelerator
    if folder.rows and not len(folder.losses):  # the last run may have ended before `keep_best`
        keep_best(training, training.evaluated(), folder)
        accelerator.wait_for_everyone()  # all test the best
    with Interruption(accelerator) as interruption:
        for epoch in range(len(folder.rows), training.recipe.epochs):
            with training.training_mode(epoch):
                figures, losses = train_epoch(training, folder, interruption)
            evaluated = training.evaluated()
            try:
                with interruption.at_once():
                    figures |= training.validate(evaluated, validation, "val")
            except (StoppedError, UserError, torch.OutOfMemoryError) as error:
                saved = training.recipe.save_steps or len(folder.losses) == len(losses)
                # A signal stops all processes, an error perhaps one, and they save together.
                together = isinstance(error, StoppedError) or accelerator.num_processes == 1
                if together and not saved:
                    folder.save_state(accelerator, training.ema, losses)
                if isinstance(error, StoppedError):
                    stop(accelerator, error.number, f"the last step of epoch {epoch + 1}")
                raise
            row = {"epoch": epoch + 1, **figures}
            folder.add_row(row)
            accelerator.log(row, step=epoch + 1)
            folder.save_state(accelerator, training.ema)
            keep_best(training, evaluated, folder)
            warn_of_collapse(training, folder.rows)
            if number := interruption.now():
                stop(accelerator, number, f"epoch {epoch + 1}")


def keep_best(training: Training, evaluated: RobustClassifier, folder: RunFolder) -> None:
    """Write the metrics, and the model if the last epoch is the best, in the main process."""
    if training.accelerator.is_main_process:
        if best_epoch(folder.rows) == len(folder.rows):
            folder.write_best(training.keep(evaluated))
        folder.write_metrics()


def warn_of_collapse(training: Training, rows: list[dict[str, float]]) -> None:
    """Log a warning if the last epoch is the first with catastrophic overfitting."""
    if collapsed_epoch(rows) == len(rows) and training.accelerator.is_main_process:
        best, last = max(row[ROBUST_ACCURACY] for row in rows), rows[-1][ROBUST_ACCURACY]
        remedy = "; training continues with more steps" if training.fall_back else ""
        log.warning(
            f"warning: epoch {len(rows)}: {ROBUST_ACCURACY} fell to {last:.4g} from {best:.4g}, "
            f"as in catastrophic overfitting to an attack of few steps{remedy}."
        )


def stop(accelerator: Accelerator, number: int, place: str) -> None:
    """End the run after a signal; its state was saved at this place."""
    if accelerator.is_main_process:
        name = signal.Signals(number).name
        log.warning(f"{name}: stopped after {place}; continue with --resume.")
    accelerator.wait_for_everyone()  # a launcher ends the others when the first has ended
    raise StoppedError(number)


def train_epoch(
    training: Training, folder: RunFolder, interruption: Interruption
) -> tuple[dict[str, float], Tensor]:
    """Train one epoch, from the folder's last state within it on.

    Returns the mean loss and the learning rate, and this process's loss in each step, (steps,).
    Without extra images, each image is used once, except those that would be in an incomplete last
    batch. The learning rate is that of the last step; with layer decay, that of the head.
    """
    accelerator, loader = training.accelerator, training.train_loader
    epoch, steps = len(folder.rows), len(loader)
    start = min(len(folder.losses), steps)  # data that may have changed can have become less
    save_steps = training.recipe.save_steps or 0
    objective = training.objective
    if training.fall_back and collapsed_epoch(folder.rows):
        objective = training.fall_back
    losses, rates = torch.zeros(steps, device=accelerator.device), [0.0] * steps
    loader.set_epoch(epoch, start)
    losses[:start] = folder.losses[:start]
    show = partial(tqdm, desc=f"epoch {epoch + 1}", disable=not accelerator.is_main_process)
    done = saved = start
    try:
        for step, batch in enumerate(show(loader, initial=start, total=steps), start):
            losses[step] = train_step(training, objective, batch, epoch, step)
            rates[step] = largest_rate(training)
            done, last = step + 1, step + 1 == steps
            number = interruption.now() if last else interruption.after_step()
            saves = number or (save_steps and (last or done % save_steps == 0))
            if saves or done % CHECK_STEPS == 0:
                require_finite(training, folder, losses[:done], rates)
            if saves:
                folder.save_state(accelerator, training.ema, losses[:done])
                saved = done
            if number:
                stop(accelerator, number, f"epoch {epoch + 1}, step {done} of {steps}")
    except UserError:  # an image that cannot be read, or too little memory
        if done > saved and accelerator.num_processes == 1:
            require_finite(training, folder, losses[:done], rates)
            folder.save_state(accelerator, training.ema, losses[:done])
        raise
    require_finite(training, folder, losses, rates)
    loss = float(accelerator.reduce(losses.mean(), "mean"))  # pyright: ignore[reportArgumentType]
    return {"train_loss": loss, "lr": largest_rate(training)}, losses


def largest_rate(training: Training) -> float:
    """The learning rate of the last step; with layer decay, that of the head."""
    return max(group["lr"] for group in training.optimizer.param_groups)


def train_step(
    training: Training, objective: Objective, batch: Batch, epoch: int, step: int
) -> Tensor:
    """Update the weights once, from this process's share of a batch; its mean loss, detached."""
    recipe, accelerator = training.recipe, training.accelerator
    update = epoch * len(training.train_loader) + step
    while True:
        try:
            loss = compute_gradients(training, objective, batch, epoch, step)
            break
        except torch.OutOfMemoryError as error:
            require_smaller_parts(training, len(batch["images"]), error)
        except ValueError as error:
            explain_batch_norm(training, len(batch["images"]), error)
            raise
        # Outside the except clause, whose error keeps the step's tensors alive.
        training.model.zero_grad()
        accelerator.gradient_accumulation_steps *= 2
    if recipe.optimizer.clip_grad:
        accelerator.clip_grad_norm_(training.model.parameters(), recipe.optimizer.clip_grad)
    training.scheduler.step_update(update)
    training.optimizer.step()
    training.optimizer.zero_grad()
    if training.ema:
        training.ema.update(training.gathered(), step=update)
    return loss


def explain_batch_norm(training: Training, share: int, error: ValueError) -> None:
    """Raise UserError if batch norm refuses a part with one image of one position."""
    if "Expected more than 1 value per channel" in str(error):
        images = share // training.accelerator.gradient_accumulation_steps
        raise UserError(
            "batch_size: expected at least 2 images per process and part, as batch norm needs, "
            f"found {images}: raise it, or lower gradient_accumulation."
        ) from error


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that is a function of all arguments."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def compute_gradients(
    training: Training, objective: Objective, batch: Batch, epoch: int, step: int
) -> Tensor:
    """Forward and backward pass of each part of the share; the mean loss, detached."""
    seed, accelerator = training.recipe.seed, training.accelerator
    draw = 0 if training.repeats_attacks else epoch
    image_draws = image_seeds(derived_seed(seed, draw), batch["indices"])
    # Drop-path and mixing then depend on nothing that came before, such as a resume.
    set_seed(derived_seed(seed, epoch, step, accelerator.process_index))
    parts = accelerator.gradient_accumulation_steps
    accelerator.step = 0  # of the accumulation; a resumed run may have another number of parts
    total = torch.zeros((), device=accelerator.device)
    columns = (batch["images"], batch["labels"], image_draws)
    for images, labels, seeds in zip(*(each.chunk(parts) for each in columns), strict=True):
        # From the loader's pinned memory: the CPU does not wait for the GPU. Apple's would not keep
        # memory that is not pinned until it is copied.
        pinned = accelerator.device.type == "cuda"
        images = images.to(accelerator.device, non_blocking=pinned)
        labels = labels.to(accelerator.device, non_blocking=pinned)
        with accelerator.accumulate(training.model):
            with accelerator.autocast():
                examples = objective.examples(training.classifier, images, labels, seeds)
            perturbed = nullcontext()
            if training.awp_gamma and epoch >= training.awp_warmup:
                victim_loss = partial(objective.loss, examples=examples)
                weights = (accelerator, training.classifier)
                perturbed = perturbed_weights(*weights, victim_loss, training.awp_gamma)
            with perturbed:
                with accelerator.autocast():
                    loss = objective.loss(training.trained_model(epoch), examples)
                accelerator.backward(loss)
        total += loss.detach() / parts
    training.average_gradients(epoch)
    return total


def require_smaller_parts(training: Training, share: int, error: Exception) -> None:
    """Raise UserError unless the recipe allows to compute a step in twice as many parts.

    The batch stays the same, and so do the weights, within rounding, except for what each part
    draws or computes for itself: drop-path, batch norm, adversarial weight perturbation.
    """
    parts = training.accelerator.gradient_accumulation_steps
    pairs = isinstance(training.objective, Challenge | MixedCrossEntropy)  # of images in each part
    if not training.recipe.auto_batch_size or share % ((4 if pairs else 2) * parts):
        raise UserError(
            f"out of memory with {share // parts} images at once: increase gradient_accumulation "
            "(same batch; auto_batch_size finds it), set mixed_precision to bf16, or lower "
            "batch_size."
        ) from error
    log.warning(
        f"warning: out of memory with {share // parts} images at once; "
        f"continuing with gradient_accumulation {2 * parts}."
    )


def require_finite(
    training: Training, folder: RunFolder, losses: Tensor, rates: list[float]
) -> None:
    """Raise UserError in all processes if a weight or, in any process, a loss is not finite.

    Args:
        training: Its classifier's weights are checked.
        folder: Named in the error, as is the learning rate.
        losses: (steps,), this process's since the start of the epoch.
        rates: The learning rate of each step.
    """
    gathered = training.accelerator.gather(losses[None])  # (processes, steps)
    assert isinstance(gathered, Tensor)
    wrong = (~gathered.T.isfinite()).nonzero()
    weights = torch.stack([each.isfinite().all() for each in training.classifier.parameters()])
    if len(wrong):
        step, process = wrong[0].tolist()
        fault = f"a finite loss, found {float(gathered[process, step])}"
    elif not weights.all():  # the same in all processes, or in the shards of all
        step, fault = len(losses) - 1, "finite weights after it, found NaN or infinity"
    else:
        return
    raise UserError(
        f"epoch {len(folder.rows) + 1}, step {step + 1}: expected {fault} at a learning rate of "
        f"{rates[step]:.4g}; the last good state is {folder.last_state() or 'none yet'}."
    )
