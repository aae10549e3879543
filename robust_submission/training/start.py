"""What a classifier's training starts from: new weights, another run's, or pretrained ones."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import set_seed
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from pydantic import BaseModel
from torch import Tensor, nn

from robust_submission.cli.documents import read_json, read_yaml, validated
from robust_submission.cli.errors import UserError, log_once
from robust_submission.data.sources import match_classes
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.configuration import IMAGENET_MEAN, IMAGENET_STD
from robust_submission.models.load import load_trn
from robust_submission.models.surgery import evaluating
from robust_submission.models.weights import (
    head_of,
    load_backbone,
    load_weights,
    published_weights,
)
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
        _compare_pixels(f"the weights of {config.backbone}", published, config)
    elif start is not None and is_backbone(start):
        load_backbone(classifier.backbone, start)
        path = start.with_name("config.json")
        if path.is_file():  # of timm, which saves it beside the weights
            told = validated(_Published, read_json(path, "a configuration"), path)
            _compare_pixels(f"the weights in {start}", vars(told.pretrained_cfg or told), config)
    elif start is not None:
        drawn = copy.deepcopy(head_of(classifier.backbone).state_dict())
        load_weights(classifier, start / SAFETENSORS_SINGLE_FILE, without="restore.")
        path = start / "config.json"
        former = validated(_Former, read_json(path, "a classifier's arguments"), path)
        _compare_pixels(f"the weights in {start}", vars(former), config)
        _match_classes(path, former.class_names, classifier, drawn)


class _Former(BaseModel):
    """What is read of the config.json of a run that another starts from."""

    class_names: list[str]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


class _Pixels(BaseModel):
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class _Published(_Pixels):
    """What is read of timm's config.json; older ones have all on one level."""

    pretrained_cfg: _Pixels | None = None


def _compare_pixels(origin: str, former: Mapping[str, Any], config: ModelConfig) -> None:
    """Say where the weights were trained on pixels of another mean or deviation."""
    for name, own in (("mean", config.mean), ("std", config.std)):
        theirs = former.get(name)
        if theirs is not None and tuple(theirs) != tuple(own):
            trained = f"{origin} were trained with {theirs}"
            log_once(f"model.{name}: {trained}, this run has {own}.")


def _match_classes(
    path: Path, former: list[str], classifier: RobustClassifier, drawn: Mapping[str, Tensor]
) -> None:
    """Bring the rows of the head from the former run's order of classes into that of this one.

    For other classes than the former run's, it becomes the head that was `drawn`.
    """
    head, names = head_of(classifier.backbone), classifier.class_names
    try:
        rows, _ = match_classes(np.arange(len(names)), names, former, path)
    except UserError:
        log_once(f"{path}: the classes are others; a head for {len(names)} is drawn from the seed.")
        head.load_state_dict(drawn)
        return
    for layer in head.modules():  # in some, a norm precedes the last layer
        if isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == len(names):
            for weight in layer.parameters():
                weight.data = weight.data[torch.from_numpy(rows)]


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
