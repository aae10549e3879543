"""Weights from files: safetensors alone, never a pickle, and every tensor of them."""

from pathlib import Path
from typing import Any, cast

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from robust_submission.cli.documents import open_file
from robust_submission.cli.errors import UserError, log_once


def load_weights(model: nn.Module, path: Path, without: str | None = None) -> None:
    """Load every tensor of a safetensors file into `model`, strictly.

    Args:
        model: Changed in place.
        path: The file.
        without: Tensors of the file whose names begin so are not taken, which a line says.

    Raises:
        UserError: the file is missing, unreadable or not safetensors, or its tensors are not those
            of the model (the first difference is named).
    """
    found = _read(path)
    if without and (others := [name for name in found if name.startswith(without)]):
        log_once(f"{path}: not taken, {len(others)} tensors of {without.rstrip('.')}.")
        found = {name: found[name] for name in found.keys() - others}
    _fill(model, found, path)


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Load a safetensors file of timm's names into a network of timm, perhaps but for the head.

    Where the file has no head, or one of another number of classes, the network's own stays, and a
    line says so.

    Raises:
        UserError: see `load_weights`.
    """
    found, expected = _read(path), backbone.state_dict()
    head = _head_names(backbone)
    kept = {name for name in head & found.keys() if _classes_differ(found[name], expected[name])}
    kept = kept if head & found.keys() else head
    if kept:
        name = min(kept, key=lambda name: -expected[name].ndim)
        classes = f"{len(found[name])} classes" if name in found else "no classes"
        new = f"a head for {len(expected[name])} is drawn from the seed"
        log_once(f"{path}: weights for {classes}; {new}.")
    _fill(backbone, found | {name: expected[name] for name in kept}, path)


def published_weights(name: str) -> Path:
    """The safetensors file of a timm model's pretrained weights, from the hub or its cache.

    Args:
        name: Of the model, perhaps with the tag of one of its weights (`resnet50.a1_in1k`).

    Raises:
        UserError: there are none, they are not safetensors, or they are in no reach.
    """
    expected, config = f"model.pretrained: expected weights of {name}", get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"{expected} in timm, found none.")
    if not config.hf_hub_id:
        found = f"none but {config.url}, a pickle, which is not read"
        raise UserError(f"{expected} as safetensors on the Hugging Face Hub, found {found}.")
    repository, _, revision = config.hf_hub_id.partition("@")
    try:
        path = hf_hub_download(repository, SAFETENSORS_SINGLE_FILE, revision=revision or None)
    except (OSError, ValueError) as error:
        found = (str(error) or type(error).__name__).splitlines()[0]
        tried = f"{SAFETENSORS_SINGLE_FILE} of {repository} on the Hugging Face Hub or in its cache"
        raise UserError(f"{expected}, {tried}, found {found}") from error
    return Path(path)


def head_of(backbone: nn.Module) -> nn.ModuleList:
    """The last layer of a timm network, from features to logits; in some there are two."""
    head = cast(Any, backbone).get_classifier()
    return nn.ModuleList(head if isinstance(head, tuple | list) else [head])


def _head_names(backbone: nn.Module) -> set[str]:
    head = {id(each) for each in head_of(backbone).state_dict(keep_vars=True).values()}
    state = backbone.state_dict(keep_vars=True)
    return {name for name, each in state.items() if id(each) in head}


def _classes_differ(found: Tensor, expected: Tensor) -> bool:
    return found.shape[:1] != expected.shape[:1] and found.shape[1:] == expected.shape[1:]


def _read(path: Path) -> dict[str, Tensor]:
    open_file(path, "a safetensors file", most=2**40).close()
    try:
        return load_file(path)
    except SafetensorError as error:
        found = f"found other bytes: {error}"
        raise UserError(f"{path}: expected a safetensors file, {found}.") from error


def _fill(model: nn.Module, found: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{path}: expected the tensor {name}, found none of that name.")
        if found[name].shape != tensor.shape:
            shape = f"of shape {tuple(tensor.shape)}, found {tuple(found[name].shape)}"
            raise UserError(f"{path}: expected {name} {shape}.")
    if foreign := sorted(found.keys() - expected.keys()):
        more = f"{len(foreign)} more: {foreign[0]}"
        raise UserError(f"{path}: expected the model's tensors alone, found {more}.")
    model.load_state_dict(found, strict=True)
