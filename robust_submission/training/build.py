"""From a recipe to the objects of a run."""

import warnings
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from robust_submission.cli.errors import UserError
from robust_submission.models.checkpoint import load_weights
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import load_trn
from robust_submission.models.surgery import evaluating
from robust_submission.runtime import start_accelerator
from robust_submission.training.data import TrainingData
from robust_submission.training.muon import avoid_emulated_bfloat16
from robust_submission.training.objectives import (
    attack_revealed,
    build_fall_back,
    build_objective,
    validation_attack,
)
from robust_submission.training.recipe import ModelConfig, ObjectiveConfig, Recipe, RunRecipe
from robust_submission.training.run_folder import RunFolder
from robust_submission.training.sharding import is_sharded, require_whole_weights, whole_copy
from robust_submission.training.state import Training
from robust_submission.training.weight_perturbation import WeightPerturbation


def start_run(recipe: RunRecipe) -> tuple[Accelerator, RunFolder]:
    """The processes and the run folder.

    Raises:
        UserError: see `RunFolder`; or a mixed precision that the device does not have, a tracker
            that is not installed, `auto_batch_size` with several processes.
    """
    accelerator = start_accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        log_with=list(recipe.trackers) or None,  # pyright: ignore[reportArgumentType]
        project_dir=recipe.output,
    )
    if recipe.auto_batch_size and accelerator.num_processes > 1:
        raise UserError(
            f"auto_batch_size: expected one process, received {accelerator.num_processes}; "
            "set gradient_accumulation."
        )
    if recipe.mixed_precision != "no" and not accelerator.native_amp:
        device = accelerator.device.type
        raise UserError(f"mixed_precision: expected no or bf16 on {device}, received fp16.")
    installed = ["all", *map(str, accelerator.log_with)]
    if missing := [name for name in recipe.trackers if name not in installed]:
        raise UserError(f"trackers: expected {missing[0]} to be installed, found no such package.")
    with accelerator.main_process_first():  # the others find what it made
        folder = RunFolder(recipe, is_main=accelerator.is_main_process)
    return accelerator, folder


def build_classifier(recipe: Recipe, class_names: list[str]) -> RobustClassifier:
    """The recipe's classifier with weights drawn from its seed, or those it starts from.

    Raises:
        UserError: the run to start from, or the TRN, is missing or of another shape; the backbone
            does not take images of this size.
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
    check_size(classifier, config)
    if recipe.checkpoint is not None:
        load_weights(classifier, recipe.checkpoint / SAFETENSORS_SINGLE_FILE)
    if recipe.trn is not None:
        classifier.attach_trn(load_trn(recipe.trn).requires_grad_(False))
    return classifier


def check_size(classifier: RobustClassifier, config: ModelConfig) -> None:
    """Classify a black image; ValueError when the backbone cannot."""
    size = config.image_size
    try:
        with torch.no_grad(), evaluating(classifier):
            classifier.classify(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"model.image_size: expected one that {config.backbone} takes, received {size}: {error}"
        ) from error


def build_optimizer(recipe: RunRecipe, trained: nn.Module) -> Optimizer:
    """timm's optimiser, with its parameter groups for weight decay and layer decay.

    Adam, AdamW and SGD update all weights in one kernel of torch's ("fused").
    """
    avoid_emulated_bfloat16()
    config = recipe.optimizer
    try:
        optimizer = create_optimizer_v2(
            trained,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"optimizer: {config.name}: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"optimizer.name: expected one of first order, received {config.name}.")
    if isinstance(optimizer, Adam | SGD):  # AdamW is an Adam
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def build_training(recipe: Recipe, accelerator: Accelerator, data: TrainingData) -> Training:
    """Model, optimiser, schedule and objective, handed to accelerate.

    Raises:
        UserError: the weights are sharded, and the recipe has a TRN, perturbs weights or has them
            channels-last.
    """
    if recipe.trn is not None or recipe.objective.awp_gamma:
        require_whole_weights(accelerator, "trn and objective.awp_gamma")
    channels_last = recipe.model.channels_last
    if channels_last:
        require_whole_weights(accelerator, "model.channels_last")
    elif channels_last is None:
        channels_last = accelerator.device.type == "cpu" and not is_sharded(accelerator)
    classifier = build_classifier(recipe, data.class_names)
    optimizer = build_optimizer(recipe, classifier.backbone)
    scheduler = build_scheduler(recipe, optimizer, updates_per_epoch=len(data.train))
    arrange_backbone(
        recipe.model,
        classifier.backbone,
        channels_last=channels_last,
        graphs=takes_graphs(recipe, accelerator),
    )
    # Before prepare: it patches the classifier's forward, and a copy would call the original's.
    ema = build_average(recipe, classifier)
    attack = validation_attack(recipe.objective)
    whole = whole_copy(accelerator, classifier)
    model, prepared = accelerator.prepare(classifier, optimizer)
    return Training(
        recipe=recipe,
        accelerator=accelerator,
        classifier=classifier,
        whole=whole,
        model=model,
        optimizer=prepared,
        scheduler=scheduler,
        objective=build_objective(recipe.objective, recipe.mixup),
        fall_back=build_fall_back(recipe.objective),
        perturbation=build_perturbation(recipe.objective, len(data.train)),
        validation_attacks={"robust_accuracy": partial(attack_revealed, attack)} if attack else {},
        ema=ema.to(accelerator.device) if ema else None,
        train_loader=data.train,
    )


def takes_graphs(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether a compiled backbone may be CUDA graphs, which overwrite what they gave before.

    So they would overwrite gradients that are to be added up. Several processes were not tried.
    """
    adds_up = recipe.gradient_accumulation > 1 or recipe.auto_batch_size
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1 and not adds_up


def arrange_backbone(
    config: ModelConfig, backbone: nn.Module, *, channels_last: bool, graphs: bool = False
) -> None:
    """Set how the backbone computes. The results stay, within rounding, and the names of its state.

    Args:
        config: Whether to compile, and to keep activations.
        backbone: Changed in place.
        channels_last: Lay the weights out channels-last.
        graphs: Where it is compiled, have a GPU run it as CUDA graphs: small images keep it waiting
            for the CPU to start each kernel otherwise.

    Raises:
        UserError: gradient checkpointing of a backbone that has none.
    """
    if config.gradient_checkpointing:
        try:
            backbone.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
        except (AttributeError, AssertionError) as error:  # timm's models without it assert
            raise UserError(
                "model.gradient_checkpointing: expected a backbone that supports it, "
                f"received {config.backbone}."
            ) from error
    optimize_for_cpu(backbone, channels_last=channels_last)
    if channels_last:
        # Said by DDP of 1x1 kernels, whose strides along sides of 1 it compares too.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    if config.compile:
        backbone.compile(mode="reduce-overhead" if graphs else None)


def build_perturbation(
    config: ObjectiveConfig, updates_per_epoch: int
) -> WeightPerturbation | None:
    """The perturbation of the weights that a recipe asks for."""
    if config.awp_gamma == 0:
        return None
    first_update = config.awp_warmup * updates_per_epoch
    return WeightPerturbation(gamma=config.awp_gamma, first_update=first_update)


def build_scheduler(recipe: RunRecipe, optimizer: Optimizer, updates_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped before each update."""
    name, scheduler = recipe.optimizer.schedule, None
    if name != "plateau":  # which follows the metrics of epochs, not updates
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.optimizer.warmup_epochs,  # pyright: ignore[reportArgumentType]
            warmup_lr=0,
            min_lr=recipe.optimizer.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    if scheduler is None:
        raise UserError(
            f"optimizer.schedule: expected a timm schedule by updates, received {name!r}."
        )
    return scheduler


def build_average(recipe: RunRecipe, classifier: RobustClassifier) -> ModelEmaV3 | None:
    """timm's average of the weights, its decay growing from 0 so that the start is forgotten."""
    if recipe.ema_decay is None:
        return None
    return ModelEmaV3(classifier, decay=recipe.ema_decay, use_warmup=True)
