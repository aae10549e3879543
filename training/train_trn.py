"""Train a TRN that restores attacked images for a trained classifier.

    accelerate launch training/train_trn.py --config training/recipes/cifar10_trn.yaml
    python inference/predict.py --checkpoint runs/cifar10 --trn runs/cifar10_trn --out sub.csv

Adversarial images are made on the fly, by attackers who know the classifier and not the TRN. Runs
unchanged under python, accelerate launch and torchrun. The run folder holds the best TRN,
metrics.csv, recipe.yaml and the state to resume; `val_accuracy` is of clean images through the TRN,
`val_restored_accuracy` of images that such an attacker made with PGD, where an image counts only if
it is right when clean: the attack's direction tells of the label. What an attacker who knows of the
TRN leaves of it, inference/evaluate.py tells.
"""

from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

from robust_submission.attacks.pgd import PGD
from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.models.checkpoint import load_weights
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import load_named
from robust_submission.models.trn import TRN
from robust_submission.training.build import (
    build_average,
    build_optimizer,
    build_scheduler,
    start_run,
)
from robust_submission.training.data import TrainingData, load_data
from robust_submission.training.loop import fit
from robust_submission.training.sharding import require_whole_weights
from robust_submission.training.state import Training
from robust_submission.training.trn_objective import (
    RestorationLoss,
    RestorationObjective,
    attack_unaware,
    build_mixture,
)
from robust_submission.training.trn_recipe import TRNRecipe

DIGITS = Path(__file__).parent / "recipes" / "digits_trn.yaml"


def build_classifier(recipe: TRNRecipe) -> RobustClassifier:
    """The trained classifier with a fresh TRN before it, whose weights are drawn from the seed.

    Raises:
        UserError: there is no such classifier, or the surrogate refuses its arguments.
    """
    model = load_named(recipe.checkpoint, recipe.model).model
    if not isinstance(model, RobustClassifier):
        raise UserError(f"model: expected a RobustClassifier, found {type(model).__name__}.")
    arguments: dict[str, Any] = dict(vars(recipe.trn))
    start: Path | None = arguments.pop("start")
    if recipe.trn.surrogate is not None:
        arguments["surrogate"] = {"num_classes": len(model.class_names)} | recipe.trn.surrogate
    set_seed(recipe.seed)
    model.requires_grad_(recipe.objective.end_to_end)
    try:
        trn = TRN(**arguments)
    except TypeError as error:
        raise UserError(f"trn.surrogate: {error}.") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    model.attach_trn(trn)
    if start is not None:
        load_weights(model.restore, start / SAFETENSORS_SINGLE_FILE)
    return model


def build_training(
    recipe: TRNRecipe, classifier: RobustClassifier, accelerator: Accelerator, data: TrainingData
) -> Training:
    """Loss, optimiser and schedule, handed to accelerate.

    Raises:
        UserError: the weights are sharded.
    """
    require_whole_weights(accelerator, "a TRN")
    config = recipe.objective
    surrogate = _trn(classifier).surrogate
    if surrogate and not config.distillation:  # nothing teaches it
        surrogate.requires_grad_(False)
    optimizer = build_optimizer(recipe, classifier if config.end_to_end else classifier.restore)
    scheduler = build_scheduler(recipe, optimizer, updates_per_epoch=len(data.train))
    optimize_for_cpu(classifier, channels_last=accelerator.device.type == "cpu")
    ema = build_average(recipe, classifier)
    model, prepared = accelerator.prepare(RestorationLoss(classifier, config), optimizer)
    epsilon = max(each.epsilon for each in config.attacks)
    attack = PGD(epsilon=epsilon, step_size=epsilon / 4, steps=10)
    return Training(
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
        keep=(lambda model: model) if config.end_to_end else _trn,
    )


def _trn(classifier: RobustClassifier) -> TRN:
    assert isinstance(classifier.restore, TRN)
    return classifier.restore


def train_trn(recipe: TRNRecipe) -> None:
    """Train as the recipe says and leave a run folder."""
    accelerator, folder = start_run(recipe)
    classifier = build_classifier(recipe)
    data = load_data(recipe, classifier.image_size, accelerator)
    if data.class_names != classifier.class_names:
        raise UserError(
            f"data: expected the classifier's classes in its order, {classifier.class_names}, "
            f"found {data.class_names}."
        )
    training = build_training(recipe, classifier, accelerator, data)
    folder.begin(accelerator, training.ema, data.identity())
    fit(training, data.validation, folder)
    accelerator.end_training()


if __name__ == "__main__":
    run(train_trn, TRNRecipe, default_config=DIGITS)
