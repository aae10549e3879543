"""From a recipe to what a run works with, for a classifier and for a TRN."""

import warnings
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from torch import nn

from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier, load_weights
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import load_named, load_trn
from robust_submission.models.surgery import evaluating
from robust_submission.models.trn import TRN
from robust_submission.training.data import TrainingData, load_data
from robust_submission.training.objectives import (
    CrossEntropy,
    Trades,
    attack_revealed,
    build_objective,
    validation_attack,
    with_more_steps,
)
from robust_submission.training.recipe import ModelConfig, Recipe
from robust_submission.training.state import (
    Training,
    build_average,
    build_optimizer,
    build_scheduler,
    is_sharded,
    require_whole_weights,
    whole_copy,
)
from robust_submission.training.trn import (
    RestorationLoss,
    RestorationObjective,
    TRNRecipe,
    attack_unaware,
    build_mixture,
)


def build_training(recipe: Recipe, accelerator: Accelerator) -> tuple[Training, TrainingData]:
    """A classifier's model, optimiser, schedule and objective, prepared by accelerate; its data.

    Raises:
        UserError: See `load_data` and `build_classifier`; or the weights are sharded, and the
            recipe has a TRN, perturbs weights or has them channels-last.
    """
    config, channels_last = recipe.objective, recipe.model.channels_last
    if recipe.trn is not None or config.awp_gamma:
        require_whole_weights(accelerator, "trn and objective.awp_gamma")
    if channels_last:
        require_whole_weights(accelerator, "model.channels_last")
    elif channels_last is None:
        channels_last = accelerator.device.type == "cpu" and not is_sharded(accelerator)
    data = load_data(recipe, recipe.model.image_size, accelerator)
    classifier = build_classifier(recipe, data.class_names)
    optimizer = build_optimizer(recipe.optimizer, classifier.backbone)
    scheduler = build_scheduler(recipe, optimizer, updates_per_epoch=len(data.train))
    graphs = takes_graphs(recipe, accelerator)
    arrange_backbone(recipe.model, classifier.backbone, channels_last=channels_last, graphs=graphs)
    # Before prepare: it patches the classifier's forward, and a copy would call the original's.
    ema = build_average(recipe, classifier)
    whole = whole_copy(accelerator, classifier)
    model, prepared = accelerator.prepare(classifier, optimizer)
    objective, fall_back, attacks = build_objective(recipe.objective, recipe.mixup), None, {}
    if isinstance(objective, CrossEntropy | Trades) and objective.attack:
        fall_back = with_more_steps(objective) if config.fall_back else None
        attack = validation_attack(objective.attack.epsilon)
        attacks = {"robust_accuracy": partial(attack_revealed, attack)}
    training = Training(
        recipe=recipe,
        accelerator=accelerator,
        classifier=classifier,
        whole=whole,
        model=model,
        optimizer=prepared,
        scheduler=scheduler,
        objective=objective,
        fall_back=fall_back,
        awp_gamma=config.awp_gamma,
        awp_warmup=config.awp_warmup,
        validation_attacks=attacks,
        ema=ema.to(accelerator.device) if ema else None,
        train_loader=data.train,
    )
    return training, data


def build_classifier(recipe: Recipe, class_names: list[str]) -> RobustClassifier:
    """The recipe's classifier, its weights drawn from the seed or loaded from another run.

    Raises:
        UserError: The run to start from, or the TRN, is missing or of another shape; or the
            backbone does not take images of this size.
    """
    config = recipe.model
    randomize = {"min_size": config.randomize or 0, "seed": recipe.seed}
    set_seed(recipe.seed)
    classifier = RobustClassifier(
        class_names=class_names,
        backbone=config.backbone,
        backbone_args=config.backbone_args,
        image_size=config.image_size,
        mean=list(config.mean),
        std=list(config.std),
        conceal=config.conceal,
        randomize=None if config.randomize is None else randomize,
    )
    require_size(classifier, config)
    if recipe.checkpoint is not None:
        load_weights(classifier, recipe.checkpoint / SAFETENSORS_SINGLE_FILE)
    if recipe.trn is not None:
        classifier.attach_trn(load_trn(recipe.trn).requires_grad_(False))
    return classifier


def require_size(classifier: RobustClassifier, config: ModelConfig) -> None:
    """Classify a black image; raise UserError if the backbone cannot."""
    size = config.image_size
    try:
        with torch.no_grad(), evaluating(classifier):
            classifier.classify(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"model.image_size: expected one that {config.backbone} takes, found {size}: {error}"
        ) from error


def takes_graphs(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether to run a compiled backbone as CUDA graphs.

    Not with gradient accumulation: a graph overwrites its former results, among them the gradients
    to be accumulated. Several processes were not tried.
    """
    accumulates = recipe.gradient_accumulation > 1 or recipe.auto_batch_size
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1 and not accumulates


def arrange_backbone(
    config: ModelConfig, backbone: nn.Module, *, channels_last: bool, graphs: bool = False
) -> None:
    """Set how the backbone computes, without changing its state's names or, but for rounding, its
    results.

    Args:
        config: Whether to compile, and whether to keep activations.
        backbone: Changed in place.
        channels_last: Lay the weights out channels-last.
        graphs: Run a compiled backbone as CUDA graphs, since with small images a GPU otherwise
            waits for the CPU to start each kernel.

    Raises:
        UserError: The backbone does not support gradient checkpointing.
    """
    if config.gradient_checkpointing:
        try:
            backbone.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
        except (AttributeError, AssertionError) as error:  # timm's models without it assert
            raise UserError(
                "model.gradient_checkpointing: expected a backbone that supports it, "
                f"found {config.backbone}."
            ) from error
    optimize_for_cpu(backbone, channels_last=channels_last)
    if channels_last:
        # DDP warns of 1x1 kernels, since it compares strides along sides of 1 too.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    if config.compile:
        backbone.compile(mode="reduce-overhead" if graphs else None)


def build_trn_training(
    recipe: TRNRecipe, accelerator: Accelerator
) -> tuple[Training, TrainingData]:
    """A TRN's model, optimiser, schedule and objective, prepared by accelerate; its data.

    Raises:
        UserError: See `build_restored` and `load_data`; or the data has other classes than the
            classifier, or the weights are sharded.
    """
    require_whole_weights(accelerator, "a TRN")
    classifier, config = build_restored(recipe), recipe.objective
    data = load_data(recipe, classifier.image_size, accelerator)
    if data.class_names != classifier.class_names:
        raise UserError(
            f"data: expected the classifier's classes in its order, {classifier.class_names}, "
            f"found {data.class_names}."
        )
    trn = trn_of(classifier)
    if trn.surrogate and not config.distillation:  # nothing trains it
        trn.surrogate.requires_grad_(False)
    trained = classifier if config.end_to_end else trn
    optimizer = build_optimizer(recipe.optimizer, trained)
    scheduler = build_scheduler(recipe, optimizer, updates_per_epoch=len(data.train))
    optimize_for_cpu(classifier, channels_last=accelerator.device.type == "cpu")
    ema = build_average(recipe, classifier)
    model, prepared = accelerator.prepare(RestorationLoss(classifier, config), optimizer)
    attack = validation_attack(max(each.epsilon for each in config.attacks))
    training = Training(
        recipe=recipe,
        accelerator=accelerator,
        classifier=classifier,
        model=model,
        optimizer=prepared,
        scheduler=scheduler,
        objective=RestorationObjective(mixture=build_mixture(config)),
        validation_attacks={"restored_accuracy": partial(attack_unaware, attack)},
        ema=ema.to(accelerator.device) if ema else None,
        train_loader=data.train,
        repeats_attacks=config.cache,
        keep=(lambda model: model) if config.end_to_end else trn_of,
    )
    return training, data


def build_restored(recipe: TRNRecipe) -> RobustClassifier:
    """The trained classifier behind a fresh TRN, whose weights are drawn from the seed.

    Raises:
        UserError: There is no such classifier, the surrogate has no such arguments, or the TRN to
            start from is missing or of another shape.
    """
    model = load_named(recipe.checkpoint, recipe.model).model
    if not isinstance(model, RobustClassifier):
        raise UserError(f"model: expected a RobustClassifier, found {type(model).__name__}.")
    arguments: dict[str, Any] = {**vars(recipe.trn)}
    start = arguments.pop("start")
    if recipe.trn.surrogate is not None:
        arguments["surrogate"] = {"num_classes": len(model.class_names)} | recipe.trn.surrogate
    set_seed(recipe.seed)
    model.requires_grad_(recipe.objective.end_to_end)
    try:
        model.attach_trn(TRN(**arguments))
    except TypeError as error:
        raise UserError(f"trn.surrogate: expected its arguments, found {error}.") from error
    if start is not None:
        load_weights(model.restore, start / SAFETENSORS_SINGLE_FILE)
    return model


def trn_of(classifier: RobustClassifier) -> TRN:
    """The TRN in front of a classifier."""
    assert isinstance(classifier.restore, TRN)
    return classifier.restore
