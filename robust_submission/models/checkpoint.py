"""The files of a checkpoint: config.json and safetensors, loaded strictly."""

import json
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

from robust_submission.cli.errors import UserError
from robust_submission.models.trn import TRN


def save_trn(trn: TRN, folder: Path) -> None:
    """Save a TRN's arguments and tensors into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(trn.arguments, sort_keys=True, indent=2)
    (folder / CONFIG_NAME).write_text(config)
    save_model(trn, str(folder / SAFETENSORS_SINGLE_FILE))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load every tensor of a safetensors file into `model`, strictly.

    Raises:
        UserError: the file is missing or not safetensors, or its tensors are not those of the
            model (the first difference is named).
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a safetensors file, found none.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path}: expected a safetensors file, found other bytes: {error}."
        ) from error
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{path}: expected the tensor {name}, found none of that name.")
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{path}: expected {name} of shape {tuple(tensor.shape)}, "
                f"found {tuple(found[name].shape)}."
            )
    if foreign := sorted(found.keys() - expected.keys()):
        raise UserError(
            f"{path}: expected the model's tensors alone, found {len(foreign)} more: {foreign[0]}."
        )
    model.load_state_dict(found, strict=True)
