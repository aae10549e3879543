"""Load a checkpoint, or the model that a command line names.

A name is `package.module:function` (called without arguments, gives a callable from images to
logits), a timm model (`resnet18`, with its published weights) or a Hugging Face hub id.
"""

import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from torch import Tensor, nn

from robust_submission.cli.errors import UserError
from robust_submission.models.checkpoint import load_weights
from robust_submission.models.classifier import Normalize, RobustClassifier
from robust_submission.models.trn import TRN

Model = Callable[[Tensor], Tensor]
Loaded = TypeVar("Loaded", RobustClassifier, TRN)


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
        UserError: both or neither is given, there is no such model, or its input size is unknown
            or not `image_size`; a TRN for a model that is no RobustClassifier.
    """
    if (checkpoint is None) == (model is None):
        raise UserError("expected either --checkpoint or --model, found both or neither.")
    if checkpoint is not None:
        named = _classifier(str(checkpoint), load_checkpoint(checkpoint))
    else:
        assert model is not None
        named = _by_name(model, image_size or 0)
    if not named.image_size:
        raise UserError(f"--model {model}: expected --image_size, as the model does not say it.")
    if image_size not in (None, named.image_size):
        own = f"{named.image_size}, as {named.name} has it"
        raise UserError(f"--image_size: expected {own}, found {image_size}.")
    if trn is not None:
        if not isinstance(named.model, RobustClassifier):
            raise UserError(
                f"--trn: expected a RobustClassifier to put it before, found {named.name}."
            )
        named.model.attach_trn(load_trn(trn))
    return named


def load_restoring(
    checkpoint: Path | None, model: str | None, trn: Path | None
) -> tuple[str, RobustClassifier]:
    """Name and model of a RobustClassifier with a TRN, its own or what `--trn` names; frozen.

    Raises:
        UserError: see `load_named`; or it has none.
    """
    named = load_named(checkpoint, model, trn=trn)
    if not isinstance(named.model, RobustClassifier) or not isinstance(named.model.restore, TRN):
        raise UserError(f"{named.name}: expected a RobustClassifier with a TRN, or --trn.")
    return named.name, named.model.eval().requires_grad_(False)


def _by_name(name: str, image_size: int) -> Named:
    if name.startswith("hf-hub:") or timm.is_model(name):
        return _timm(name, image_size)
    if ":" in name:
        return _function(name, image_size)
    if "/" in name:
        return _hub(name, image_size)
    nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
    raise UserError(
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
        raise UserError(
            f"{name}: expected a module to import, found {type(error).__name__}: {error}."
        ) from error
    build = getattr(module, attribute, None)
    if not callable(build):
        nearest = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; nearest: {nearest[0]}" if nearest else ""
        raise UserError(
            f"{name}: expected a function {attribute!r} in {module_name}, "
            f"found {'none' if build is None else type(build).__name__}{hint}."
        )
    try:
        model: Any = build()
    except Exception as error:
        raise UserError(
            f"{name}: expected a function that makes the model, without arguments, found "
            f"{type(error).__name__}: {error}."
        ) from error
    if not callable(model):
        raise UserError(
            f"{name}: expected a callable from images to logits, found {type(model).__name__}."
        )
    if isinstance(model, RobustClassifier):
        return _classifier(name, model)
    size = image_size or getattr(model, "image_size", 0)
    return Named(name=name, model=cast(Model, model), image_size=size)


def load_checkpoint(path: str | Path, trn: str | Path | None = None) -> RobustClassifier:
    """The classifier of a run folder, in eval mode on the CPU.

    Args:
        path: A folder with config.json and model.safetensors.
        trn: Such a folder of a TRN to put in front.

    Raises:
        UserError: a file is missing, damaged, or they do not belong together.
    """
    model = _load(RobustClassifier, path, required="class_names")
    if trn is not None:
        model.attach_trn(load_trn(trn))
    return model


def load_trn(path: str | Path) -> TRN:
    """The TRN of a run folder, in eval mode on the CPU.

    Raises:
        UserError: a file is missing, damaged, or they do not belong together.
    """
    return _load(TRN, path, required="estimator")


def _load(kind: type[Loaded], path: str | Path, required: str) -> Loaded:
    """Rebuild a model from a folder's config.json and load its tensors strictly."""
    config = Path(path) / CONFIG_NAME
    if not Path(path).is_dir():
        raise UserError(f"{path}: expected the folder of a checkpoint, found none.")
    if not config.is_file():
        raise UserError(f"{path}: expected a checkpoint with {CONFIG_NAME}, found none in it.")
    try:
        arguments = json.loads(config.read_text())
    except ValueError as error:
        raise UserError(f"{config}: expected a JSON object, found {error}.") from error
    known = inspect.signature(kind).parameters
    if not isinstance(arguments, dict) or required not in arguments:
        found = ", ".join(arguments) if isinstance(arguments, dict) else type(arguments).__name__
        raise UserError(
            f"{config}: expected the arguments of a {kind.__name__}, among them {required}, "
            f"found {found or 'none'}."
        )
    if unknown := sorted(arguments.keys() - known.keys()):
        raise UserError(
            f"{config}: expected arguments of {kind.__name__} ({', '.join(known)}), "
            f"found {unknown[0]}."
        )
    try:
        model = kind(**arguments)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{config}: expected arguments that make a {kind.__name__}, found {error}"
        ) from error
    load_weights(model, Path(path) / SAFETENSORS_SINGLE_FILE)
    return model.eval()
