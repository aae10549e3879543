"""Load the model that a command line names.

A name is `package.module:function` (called without arguments, gives a callable from images to
logits), a timm model (`resnet18`, with its published weights) or a Hugging Face hub id.
"""

import difflib
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from torch import Tensor, nn

from robust_submission.models.classifier import (
    Normalize,
    RobustClassifier,
    load_checkpoint,
    load_trn,
)
from robust_submission.models.trn import TRN

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Named:
    """A model with what it says of itself."""

    name: str
    model: Model
    image_size: int
    class_names: list[str] | None = None


def load_named(
    checkpoint: Path | None,
    model: str | None,
    image_size: int | None = None,
    trn: Path | None = None,
) -> Named:
    """Load what `--checkpoint` or `--model` names, behind what `--trn` names.

    Raises:
        ValueError: both or neither is given, there is no such model, or its input size is unknown
            or not `image_size`; a TRN for a model that is no RobustClassifier.
    """
    if (checkpoint is None) == (model is None):
        raise ValueError("expected either --checkpoint or --model, found both or neither.")
    if checkpoint is not None:
        named = _classifier(str(checkpoint), load_checkpoint(checkpoint))
    else:
        assert model is not None
        named = _by_name(model, image_size or 0)
    if not named.image_size:
        raise ValueError(f"--model {model}: expected --image_size, as the model does not say it.")
    if image_size not in (None, named.image_size):
        own = f"{named.image_size}, as {named.name} has it"
        raise ValueError(f"--image_size: expected {own}, found {image_size}.")
    if trn is not None:
        if not isinstance(named.model, RobustClassifier):
            raise ValueError(
                f"--trn: expected a RobustClassifier to put it before, found {named.name}."
            )
        named.model.attach_trn(load_trn(trn))
    return named


def load_restoring(
    checkpoint: Path | None, model: str | None, trn: Path | None
) -> tuple[str, RobustClassifier]:
    """Name and model of a RobustClassifier with a TRN, its own or what `--trn` names; frozen.

    Raises:
        ValueError: see `load_named`; or it has none.
    """
    named = load_named(checkpoint, model, trn=trn)
    if not isinstance(named.model, RobustClassifier) or not isinstance(named.model.restore, TRN):
        raise ValueError(f"{named.name}: expected a RobustClassifier with a TRN, or --trn.")
    return named.name, named.model.eval().requires_grad_(False)


def _by_name(name: str, image_size: int) -> Named:
    if name.startswith("hf-hub:") or timm.is_model(name):
        return _timm(name, image_size)
    if ":" in name:
        return _function(name, image_size)
    if "/" in name:
        return _hub(name, image_size)
    nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
    raise ValueError(
        f"{name}: expected package.module:function, a timm model or a hub id, found "
        f"none of them{f'; nearest timm model: {nearest[0]}' if nearest else ''}."
    )


def _classifier(name: str, model: RobustClassifier) -> Named:
    return Named(name=name, model=model, image_size=model.image_size, class_names=model.class_names)


def _timm(name: str, image_size: int) -> Named:
    network = timm.create_model(name, pretrained=True)
    config = cast(dict[str, Any], network.pretrained_cfg)
    return Named(
        name=name,
        model=nn.Sequential(Normalize(config["mean"], config["std"]), network),
        image_size=image_size or config["input_size"][-1],
    )


def _hub(name: str, image_size: int) -> Named:
    config = json.loads(Path(hf_hub_download(name, CONFIG_NAME)).read_text())
    if "architecture" in config:  # timm's; ours has class_names
        return _timm(f"hf-hub:{name}", image_size)
    return _classifier(name, RobustClassifier.from_pretrained(name))


def _function(name: str, image_size: int) -> Named:
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code: anything
        raise ValueError(
            f"{name}: expected a module to import, found {type(error).__name__}: {error}."
        ) from error
    build = getattr(module, attribute, None)
    if not callable(build):
        nearest = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; nearest: {nearest[0]}" if nearest else ""
        raise ValueError(
            f"{name}: expected a function {attribute!r} in {module_name}, "
            f"found {'none' if build is None else type(build).__name__}{hint}."
        )
    try:
        model: Any = build()
    except Exception as error:
        raise ValueError(
            f"{name}: expected a function that makes the model, without arguments, found "
            f"{type(error).__name__}: {error}."
        ) from error
    if not callable(model):
        raise ValueError(
            f"{name}: expected a callable from images to logits, found {type(model).__name__}."
        )
    if isinstance(model, RobustClassifier):
        return _classifier(name, model)
    size = image_size or getattr(model, "image_size", 0)
    return Named(name=name, model=cast(Model, model), image_size=size)
