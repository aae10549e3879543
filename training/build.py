"""From a recipe to the objects of a run."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from cli.processes import start_accelerator
from data.augmentation import build_augmentation
from data.loader import (
    MICRO_BATCH,
    EvaluationLoader,
    ImageDataset,
    TrainingLoader,
    evaluation_loader,
    training_loader,
)
from data.sources import (
    Source,
    available_splits,
    open_source,
    split_train_validation,
    stratified_subset,
)
from models.classifier import RobustClassifier, load_trn, load_weights
from training.loop import Training
from training.objectives import attack_revealed, build_objective, validation_attack
from training.recipe import DataConfig, Recipe, RunRecipe
from training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The loaders of one process; `test` is None where the source has no test images."""

    class_names: list[str]
    train: TrainingLoader
    validation: EvaluationLoader
    test: EvaluationLoader | None


def start_run(recipe: RunRecipe) -> tuple[Accelerator, RunFolder]:
    """The processes and the run folder.

    Raises:
        ValueError: see `RunFolder`.
    """
    accelerator = start_accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        log_with=list(recipe.trackers),  # pyright: ignore[reportArgumentType]
        project_dir=recipe.output,
    )
    with accelerator.main_process_first():  # the others find what it made
        folder = RunFolder(recipe, is_main=accelerator.is_main_process)
    return accelerator, folder


def load_data(recipe: RunRecipe, image_size: int, accelerator: Accelerator) -> TrainingData:
    """Training, validation and test images of this process.

    Validation images are the source's own val split, else a stratified share of the training
    images; the test images are never used to choose anything.

    Raises:
        ValueError: no such data, no labels, or a batch that the processes cannot share evenly.
    """
    config, parts = recipe.data, accelerator.num_processes * recipe.gradient_accumulation
    if recipe.batch_size % parts:
        raise ValueError(
            f"batch_size: expected a multiple of processes x gradient_accumulation = {parts}, "
            f"received {recipe.batch_size}."
        )
    with accelerator.main_process_first():  # one process downloads
        source = _open(config, "train")
    if source.labels is None or source.class_names is None:
        raise ValueError(f"data.name: expected a source with labels, received {config.name}.")
    splits = available_splits(config.name, config.root)
    chosen = stratified_subset(source.labels, config.limit, recipe.seed)
    fraction = 0 if "val" in splits else config.validation_fraction
    kept, held_out = split_train_validation(source.labels[chosen], fraction, recipe.seed)
    held_out = chosen[held_out]
    validation = source
    if "val" in splits:
        validation = _open(config, "val")
        held_out = np.arange(len(validation))
    assert validation.labels is not None
    some = stratified_subset(validation.labels[held_out], config.validation_limit, recipe.seed)
    evaluation = partial(_evaluation_loader, recipe, image_size, accelerator)
    return TrainingData(
        class_names=source.class_names,
        train=_training_loader(recipe, image_size, accelerator, source, chosen[kept]),
        validation=evaluation(validation, held_out[some]),
        test=evaluation(_open(config, "test"), None) if "test" in splits else None,
    )


def _open(config: DataConfig, split: str) -> Source:
    return open_source(config.name, config.root, split, download=config.download)


def _training_loader(
    recipe: RunRecipe, size: int, accelerator: Accelerator, source: Source, indices: np.ndarray
) -> TrainingLoader:
    augmentation = build_augmentation(recipe.data.augmentation, size, flip=recipe.data.flip)
    return training_loader(
        ImageDataset(source, indices, size, augmentation, seed=recipe.seed),
        batch_size=recipe.batch_size,
        num_workers=recipe.data.num_workers,
        seed=recipe.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def _evaluation_loader(
    recipe: RunRecipe,
    size: int,
    accelerator: Accelerator,
    source: Source,
    indices: np.ndarray | None,
) -> EvaluationLoader:
    return evaluation_loader(
        ImageDataset(source, indices, size),
        batch_size=MICRO_BATCH,
        num_workers=recipe.data.num_workers,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def build_classifier(recipe: Recipe, class_names: list[str]) -> RobustClassifier:
    """The recipe's classifier with weights drawn from its seed, or those it starts from.

    Raises:
        ValueError: the run to start from, or the TRN, is missing or of another shape.
    """
    config = recipe.model
    set_seed(recipe.seed)
    classifier = RobustClassifier(
        class_names=class_names,
        backbone=config.backbone,
        backbone_args=config.backbone_args,
        image_size=config.image_size,
        mean=list(config.mean),
        std=list(config.std),
        conceal=config.conceal,
        randomize=None
        if config.randomize is None
        else {"min_size": config.randomize, "seed": recipe.seed},
    )
    if recipe.checkpoint is not None:
        load_weights(classifier, recipe.checkpoint / SAFETENSORS_SINGLE_FILE)
    if recipe.trn is not None:
        classifier.attach_trn(load_trn(recipe.trn).requires_grad_(False))
    return classifier


def build_optimizer(recipe: RunRecipe, trained: nn.Module) -> Optimizer:
    """timm's optimiser, with its parameter groups for weight decay and layer decay."""
    config = recipe.optimizer
    try:
        return create_optimizer_v2(
            trained,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
    except (ValueError, AssertionError) as error:
        raise ValueError(f"optimizer: {config.name}: {error}") from error


def build_training(recipe: Recipe, accelerator: Accelerator, data: TrainingData) -> Training:
    """Model, optimiser, schedule and objective, handed to accelerate."""
    classifier = build_classifier(recipe, data.class_names)
    optimizer = build_optimizer(recipe, classifier.backbone)
    scheduler = build_scheduler(recipe, optimizer, updates_per_epoch=len(data.train))
    # Before prepare: it patches the classifier's forward, and a copy would call the original's.
    ema = build_average(recipe, classifier)
    attack = validation_attack(recipe.objective)
    model, prepared = accelerator.prepare(classifier, optimizer)
    return Training(
        recipe=recipe,
        accelerator=accelerator,
        classifier=classifier,
        model=model,
        optimizer=prepared,
        scheduler=scheduler,
        objective=build_objective(recipe.objective),
        validation_attacks={"robust_accuracy": partial(attack_revealed, attack)} if attack else {},
        mixup=build_mixup(recipe, len(data.class_names)),
        ema=ema.to(accelerator.device) if ema else None,
        train_loader=data.train,
    )


def build_scheduler(recipe: RunRecipe, optimizer: Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped after each update."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.optimizer.schedule,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.optimizer.warmup_epochs,  # pyright: ignore[reportArgumentType]
        warmup_lr=0,
        min_lr=recipe.optimizer.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    if scheduler is None:
        raise ValueError(
            f"optimizer.schedule: expected a timm schedule, received {recipe.optimizer.schedule!r}."
        )
    return scheduler


def build_average(recipe: RunRecipe, classifier: RobustClassifier) -> ModelEmaV3 | None:
    """timm's average of the weights, its decay growing from 0 so that the start is forgotten."""
    if recipe.ema_decay is None:
        return None
    return ModelEmaV3(classifier, decay=recipe.ema_decay, use_warmup=True)


def build_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's MixUp and CutMix, which then smooth the labels themselves; None where both are off."""
    config = recipe.mixup
    if not recipe.mixes:
        return None
    smoothing = recipe.objective.label_smoothing
    return Mixup(
        config.mixup_alpha,
        config.cutmix_alpha,
        prob=config.prob,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )
