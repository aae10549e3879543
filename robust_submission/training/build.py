"""From a recipe to what a run works with, for a classifier and for a TRN."""

import warnings
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from torch import nn

from robust_submission.cli.documents import validated
from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.configuration import TRNArguments
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import load_named
from robust_submission.models.trn import TRN
from robust_submission.models.weights import load_weights
from robust_submission.runtime import compile_mode
from robust_submission.training.data import TrainingData, load_data
from robust_submission.training.objectives import (
    Challenge,
    MixedCrossEntropy,
    RestorationLoss,
    attack_revealed,
    attack_unaware,
    build_objective,
    build_restoration,
    validation_attack,
    with_more_steps,
)
from robust_submission.training.optimizer import build_optimizer, build_scheduler
from robust_submission.training.recipe import ModelConfig, Recipe, TRNRecipe, require
from robust_submission.training.start import build_classifier, require_allowed
from robust_submission.training.state import Training, is_sharded, require_whole_weights


def build_training(recipe: Recipe, accelerator: Accelerator) -> tuple[Training, TrainingData]:
    """A classifier's model, optimiser, schedule and objective, prepared by accelerate; its data.

    Raises:
        UserError: See `load_data`, `build_classifier` and `require_allowed`; or the weights are
            sharded, and the recipe has a TRN, perturbs or freezes weights or has them
            channels-last.
    """
    require_allowed(recipe)
    config, channels_last = recipe.objective, recipe.model.channels_last
    if recipe.trn is not None or config.awp_gamma:
        require_whole_weights(accelerator, "trn and objective.awp_gamma")
    if recipe.model.freeze_epochs:
        require_whole_weights(accelerator, "model.freeze_epochs")
    if channels_last:
        require_whole_weights(accelerator, "model.channels_last")
    elif channels_last is None:
        channels_last = accelerator.device.type == "cpu" and not is_sharded(accelerator)
    data = load_data(recipe, recipe.model.image_size, accelerator)
    classifier = build_classifier(recipe, data.class_names)
    optimizer = build_optimizer(recipe.optimizer, classifier.backbone)
    mode = training_mode(recipe, accelerator)
    arrange_backbone(recipe.model, classifier.backbone, channels_last=channels_last, mode=mode)
    objective = build_objective(config, recipe.mixup)
    if isinstance(objective, Challenge | MixedCrossEntropy):  # before a former run is replaced
        parts = accelerator.num_processes * recipe.gradient_accumulation
        objective.mixing.partners(torch.empty(recipe.batch_size // parts))
    attacks = {}
    if config.attacks:
        attacks["robust_accuracy"] = partial(
            attack_revealed, validation_attack(config.epsilon, config.norm)
        )
    training = Training(
        recipe=recipe,
        accelerator=accelerator,
        classifier=classifier,
        model=classifier,
        optimizer=optimizer,
        scheduler=build_scheduler(recipe, optimizer, updates_per_epoch=len(data.train)),
        objective=objective,
        fall_back=with_more_steps(objective) if config.fall_back else None,
        awp_gamma=config.awp_gamma,
        awp_warmup=config.awp_warmup,
        freeze_epochs=recipe.model.freeze_epochs,
        validation_attacks=attacks,
        train_loader=data.train,
    )
    return training, data


def build_trn_training(
    recipe: TRNRecipe, accelerator: Accelerator
) -> tuple[Training, TrainingData]:
    """A TRN's model, optimiser, schedule and objective, prepared by accelerate; its data.

    Raises:
        UserError: See `require_allowed`, `build_restored` and `load_data`; or the data has other
            classes than the classifier, or the weights are sharded.
    """
    require_allowed(recipe)
    require_whole_weights(accelerator, "a TRN")
    classifier, config = build_restored(recipe), recipe.objective
    data = load_data(recipe, classifier.image_size, accelerator)
    names, trn = classifier.class_names, trn_of(classifier)
    if config.end_to_end and not classifier.rebuildable:
        kind = type(classifier.backbone).__name__
        expected = "a backbone of timm, given by its name, to save with the TRN"
        require(False, "objective.end_to_end", expected, kind)
    expected = f"the classifier's classes in its order, {names}"
    require(data.class_names == names, "data", expected, data.class_names)
    if trn.surrogate and not config.distillation:  # nothing trains it
        trn.surrogate.requires_grad_(False)
    optimizer = build_optimizer(recipe.optimizer, classifier if config.end_to_end else trn)
    optimize_for_cpu(classifier, channels_last=accelerator.device.type == "cpu")
    attack = validation_attack(max(each.epsilon for each in config.attacks))
    attacks = {"restored_accuracy": partial(attack_unaware, attack)}
    if config.adaptive:
        attacks["robust_accuracy"] = partial(attack_revealed, attack)
    training = Training(
        recipe=recipe,
        accelerator=accelerator,
        classifier=classifier,
        model=RestorationLoss(classifier, config),
        optimizer=optimizer,
        scheduler=build_scheduler(recipe, optimizer, updates_per_epoch=len(data.train)),
        objective=build_restoration(config),
        validation_attacks=attacks,
        train_loader=data.train,
        repeats_attacks=config.cache,
        keep=(lambda model: model) if config.end_to_end else trn_of,
    )
    return training, data


def training_mode(recipe: Recipe, accelerator: Accelerator) -> str | None:
    """The mode of torch.compile for training.

    No CUDA graphs with gradient accumulation: a graph overwrites its former results, among them the
    gradients to be accumulated.
    """
    accumulates = recipe.gradient_accumulation > 1 or recipe.auto_batch_size
    return compile_mode(accelerator, graphs=not accumulates)


def arrange_backbone(
    config: ModelConfig, backbone: nn.Module, *, channels_last: bool, mode: str | None = None
) -> None:
    """Set in place how the backbone computes; its state's names and, within rounding, its results
    stay.

    Args:
        config: Whether to compile, and whether to keep activations.
        backbone: Changed in place.
        channels_last: Lay the weights out channels-last.
        mode: Of torch.compile, for a compiled backbone; see `training_mode`.

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
        backbone.compile(mode=mode)


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
    validated(dict[str, TRNArguments], {"trn": arguments})
    model.attach_trn(TRN(**arguments))
    if start is not None:
        load_weights(model.restore, start / SAFETENSORS_SINGLE_FILE)
    return model


def trn_of(classifier: RobustClassifier) -> TRN:
    """The TRN in front of a classifier."""
    assert isinstance(classifier.restore, TRN)
    return classifier.restore
