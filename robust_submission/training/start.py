"""What a classifier's training starts from: new weights, another run's, or pretrained ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from pydantic import BaseModel

from robust_submission.cli.documents import read_yaml, validated
from robust_submission.cli.errors import UserError, log_once
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_trn
from robust_submission.models.surgery import evaluating
from robust_submission.models.weights import load_backbone, load_weights, published_weights
from robust_submission.training.recipe import ModelConfig, Recipe, RulesConfig, TRNRecipe


def build_classifier(recipe: Recipe, class_names: list[str]) -> RobustClassifier:
    """The recipe's classifier, its weights drawn from the seed or loaded; see `load_start`.

    Raises:
        UserError: What to start from, or the TRN, is missing or of another shape; or the backbone
            does not take images of this size.
    """
    config, randomize = recipe.model, None
    if config.randomize is not None:
        randomize = {"min_size": config.randomize, "seed": recipe.seed}
    set_seed(recipe.seed)
    classifier = RobustClassifier(
        class_names=class_names,
        backbone=config.backbone,
        backbone_args=config.backbone_args,
        stem=config.stem,
        image_size=config.image_size,
        mean=list(config.mean),
        std=list(config.std),
        conceal=config.conceal,
        randomize=randomize,
    )
    require_size(classifier, config)
    if not recipe.resume:  # the state has all weights
        load_start(recipe, classifier)
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


def load_start(recipe: Recipe, classifier: RobustClassifier) -> None:
    """Load the weights that the recipe starts from, if any; of a run behind a TRN, without it.

    Raises:
        UserError: They are missing, no safetensors, or of another shape.
    """
    config, start = recipe.model, recipe.checkpoint
    if config.pretrained:
        load_backbone(classifier.backbone, published_weights(config.backbone))
        published = cast(dict[str, Any], classifier.backbone.pretrained_cfg)
        for name, own in (("mean", config.mean), ("std", config.std)):
            if tuple(published[name]) != tuple(own):
                theirs = f"the weights of {config.backbone} were trained with {published[name]}"
                log_once(f"model.{name}: {theirs}, this run has {own}.")
    elif start is not None and is_backbone(start):
        load_backbone(classifier.backbone, start)
    elif start is not None:
        load_weights(classifier, start / SAFETENSORS_SINGLE_FILE, without="restore.")


def is_backbone(checkpoint: Path) -> bool:
    """Whether a checkpoint is a file of a backbone alone, and not a run's folder."""
    return checkpoint.suffix == ".safetensors"


class _ModelStart(BaseModel):
    pretrained: bool = False


class _TRNStart(BaseModel):
    start: Path | None = None


class _Extra(BaseModel):
    teacher: Path | None = None


class _Data(BaseModel):
    extra: _Extra | None = None


class _Start(BaseModel):
    """What a run's recipe.yaml says of where its weights and labels came from."""

    checkpoint: Path | None = None
    model: _ModelStart | str | None = None
    """Of a TRN: a user's function."""
    trn: Path | _TRNStart | None = None
    """Of a TRN: its network."""
    data: _Data = _Data()
    rules: RulesConfig = RulesConfig()


def require_allowed(recipe: Recipe | TRNRecipe) -> None:
    """Raise UserError if the rules forbid pretrained weights and the run makes use of some.

    The runs that it starts from, such as a classifier, a TRN and the teacher of extra images, are
    asked by their recipe.yaml, and so on to the first. One that was held to the same rules needs no
    more questions.
    """
    if recipe.rules.pretrained:
        return
    found = _trained_elsewhere(recipe.starts)
    if isinstance(recipe, TRNRecipe):
        found = f"the model {recipe.model}" if recipe.model else found
    elif recipe.model.pretrained:
        found = "model.pretrained"
    if found:
        expected = "no weights trained elsewhere, which these rules forbid"
        raise UserError(f"rules.pretrained: expected {expected}, found {found}.")


def _trained_elsewhere(
    starts: Sequence[Path | None], after: frozenset[Path] = frozenset()
) -> str | None:
    """The first of these checkpoints, or of what they came from, that was trained elsewhere.

    `after` are the runs that came from them.
    """
    for start in starts:
        if start is None:
            continue
        if is_backbone(start):
            return f"the checkpoint {start}"
        if start in after:  # a run was replaced by one that began from it
            return f"the checkpoint {start}, whose own start is not known"
        what = "the recipe of the run, which says how it began"
        former = validated(_Start, read_yaml(start / "recipe.yaml", what), start / "recipe.yaml")
        if isinstance(former.model, str) or (former.model and former.model.pretrained):
            return f"the checkpoint {start}, which itself began so"
        if former.rules.pretrained:
            extra = former.data.extra
            trn = former.trn.start if isinstance(former.trn, _TRNStart) else former.trn
            found = _trained_elsewhere(
                [former.checkpoint, trn, extra and extra.teacher], after | {start}
            )
            if found:
                return found
    return None
