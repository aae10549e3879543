"""Load a checkpoint, or the model that a command line names.

A name is `package.module:function` or `path/to/file.py:function` (see `user_function`), a timm
model (`resnet18`, with its published weights) or a Hugging Face hub id.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors.torch import save_model
from torch import Tensor, nn

from robust_submission.cli.documents import MEBIBYTE, read_json, validated
from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import Normalize, RobustClassifier
from robust_submission.models.configuration import ClassifierArguments, TRNArguments
from robust_submission.models.trn import TRN
from robust_submission.models.user_function import call_function
from robust_submission.models.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model, what to call it, and what it says of its input and classes."""

    name: str
    model: Callable[[Tensor], Tensor]
    """From RGB images (B, 3, H, W), 0 to 1, to logits (B, num_classes)."""
    image_size: int
    """Side of the square images in pixels."""
    class_names: list[str] | None = None


def load_named(
    checkpoint: Path | None,
    model: str | None,
    image_size: int | None = None,
    trn: Path | None = None,
) -> LoadedModel:
    """Load the model of `--checkpoint` or `--model`, with the TRN of `--trn` in front.

    Raises:
        UserError: both or neither is given, there is no such model, its input size is unknown or
            not `image_size`, or a TRN is given for a model that is no RobustClassifier.
    """
    if (checkpoint is None) == (model is None):
        raise UserError("expected either --checkpoint or --model, found both or neither.")
    if checkpoint is not None:
        loaded = _classifier(str(checkpoint), load_checkpoint(checkpoint))
    else:
        assert model is not None
        loaded = _by_name(model, image_size or 0)
    if not loaded.image_size:
        raise UserError(f"--model {model}: expected --image_size, as the model does not say it.")
    if image_size not in (None, loaded.image_size):
        own = f"{loaded.image_size}, as {loaded.name} has it"
        raise UserError(f"--image_size: expected {own}, found {image_size}.")
    if trn is not None:
        if not isinstance(loaded.model, RobustClassifier):
            expected = "a RobustClassifier to put it before"
            raise UserError(f"--trn: expected {expected}, found {loaded.name}.")
        loaded.model.attach_trn(load_trn(trn))
    return loaded


def load_restoring(
    checkpoint: Path | None, model: str | None, trn: Path | None
) -> tuple[str, RobustClassifier]:
    """Name and model of a RobustClassifier with a TRN, its own or that of `--trn`; frozen.

    Raises:
        UserError: see `load_named`; or it has none.
    """
    loaded = load_named(checkpoint, model, trn=trn)
    if not isinstance(loaded.model, RobustClassifier) or not isinstance(loaded.model.restore, TRN):
        raise UserError(f"{loaded.name}: expected a RobustClassifier with a TRN, or --trn.")
    return loaded.name, loaded.model.eval().requires_grad_(False)


def _by_name(name: str, image_size: int) -> LoadedModel:
    if name.startswith("hf-hub:") or timm.is_model(name):
        return _published(name, image_size)
    if ":" in name:
        return _users_own(name, image_size)
    if "/" in name:
        return _from_hub(name, image_size)
    nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
    raise UserError(
        f"{name}: expected package.module:function, path/to/file.py:function, a timm model or a "
        f"hub id, found none of them{f'; nearest timm model: {nearest[0]}' if nearest else ''}."
    )


def _classifier(name: str, model: RobustClassifier) -> LoadedModel:
    return LoadedModel(
        name=name, model=model, image_size=model.image_size, class_names=model.class_names
    )


def _published(name: str, image_size: int) -> LoadedModel:
    """A timm model with its published weights."""
    try:
        network = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:  # no such weights, or no way to them
        raise _no_download(name, error) from error
    config = cast(dict[str, Any], network.pretrained_cfg)
    return LoadedModel(
        name=name,
        model=nn.Sequential(Normalize(config["mean"], config["std"]), network),
        image_size=image_size or config["input_size"][-1],
    )


def _from_hub(name: str, image_size: int) -> LoadedModel:
    try:
        config = Path(hf_hub_download(name, CONFIG_NAME))
        if "architecture" in read_json(config, "a configuration"):  # timm's; ours has class_names
            return _published(f"hf-hub:{name}", image_size)
        hf_hub_download(name, SAFETENSORS_SINGLE_FILE)
    except (OSError, ValueError) as error:
        raise _no_download(name, error) from error
    return _classifier(name, load_checkpoint(config.parent))


def _no_download(name: str, error: Exception) -> UserError:
    found = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{name}: expected a model to download, found {found}")


def _users_own(name: str, image_size: int) -> LoadedModel:
    model = call_function(name)
    if not callable(model):
        found = type(model).__name__
        raise UserError(f"{name}: expected a callable from images to logits, found {found}.")
    if isinstance(model, RobustClassifier):
        return _classifier(name, model)
    size = image_size or getattr(model, "image_size", 0)
    model = cast(Callable[[Tensor], Tensor], model)
    return LoadedModel(name=name, model=model, image_size=size if isinstance(size, int) else 0)


def load_checkpoint(path: str | Path, trn: str | Path | None = None) -> RobustClassifier:
    """The classifier of a run folder, in eval mode on the CPU.

    Args:
        path: A folder with config.json and model.safetensors.
        trn: Such a folder of a TRN to put in front.

    Raises:
        UserError: a file is missing, damaged, or they do not belong together.
    """
    folder = Path(path)
    arguments = _read_arguments(folder, ClassifierArguments, "class_names", "RobustClassifier")
    try:
        model = RobustClassifier(**arguments)
    except UserError as error:
        raise UserError(f"{folder / CONFIG_NAME}: {error}") from error
    load_weights(model, folder / SAFETENSORS_SINGLE_FILE)
    if trn is not None:
        model.attach_trn(load_trn(trn))
    return model.eval()


def load_trn(path: str | Path) -> TRN:
    """The TRN of a run folder, in eval mode on the CPU.

    Raises:
        UserError: a file is missing, damaged, or they do not belong together.
    """
    folder = Path(path)
    trn = TRN(**_read_arguments(folder, TRNArguments, "estimator", "TRN"))
    load_weights(trn, folder / SAFETENSORS_SINGLE_FILE)
    return trn.eval()


def save_trn(trn: TRN, folder: Path) -> None:
    """Save a TRN's arguments and tensors into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(trn.arguments, sort_keys=True, indent=2)
    (folder / CONFIG_NAME).write_text(config)
    save_model(trn, str(folder / SAFETENSORS_SINGLE_FILE))


def _read_arguments(folder: Path, kind: type, required: str, model: str) -> dict[str, Any]:
    """The arguments in a folder's config.json, of a model that is known by the key `required`."""
    config = folder / CONFIG_NAME
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a checkpoint, found none.")
    expected = f"the arguments of a {model}"
    arguments = read_json(config, expected, most=16 * MEBIBYTE)
    if not isinstance(arguments, dict) or required not in arguments:
        found = ", ".join(arguments) if isinstance(arguments, dict) else type(arguments).__name__
        raise UserError(f"{config}: expected {expected}, among them {required}, found {found}.")
    validated(kind, arguments, config)
    return arguments
