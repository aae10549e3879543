"""A classifier as a file that the challenge accepts: a zip with its model.py, or ONNX."""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from robust_submission.cli.errors import UserError
from robust_submission.cli.files import check_writable, write_archive
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.trn import TRN
from robust_submission.packaging.config import package_config

MODEL_TEMPLATE = Path(__file__).parent / "templates" / "model.py"
STAGE_SOURCES = (
    *("gcm.py", "resize_pad.py", "trn/__init__.py", "trn/gradient_map.py", "trn/network.py"),
    "trn/surrogate.py",
)
"""Sources of `robust_submission/models` that a package holds as they are: they import torch and
one another alone, and run under Python 3.9 and torch 2.0."""
WEIGHTS = "model.safetensors"


class ChannelsReversed(nn.Module):
    """A model of RGB images for images in the challenge's channel order, BGR; or the reverse."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.flip(1))


def zip_files(model: RobustClassifier) -> dict[str, bytes]:
    """The names and contents of the files in the zip.

    Raises:
        UserError: see `package_config`.
    """
    config = json.dumps(package_config(model), indent=1) + "\n"
    sources = Path(__file__).parents[1] / "models"
    return {
        "model.py": MODEL_TEMPLATE.read_bytes(),
        "config.json": config.encode(),
        **{name: (sources / name).read_bytes() for name in STAGE_SOURCES},
        WEIGHTS: save(model.state_dict(), metadata={"format": "pt"}),
    }


def write_zip(model: RobustClassifier, path: Path) -> None:
    """Write the package: `zip_files` at its top level, nothing else."""
    write_archive(path, zip_files(model), stored=(WEIGHTS,))


def write_onnx(model: RobustClassifier, path: Path) -> None:
    """Write one ONNX file: input `images` (N, 3, S, S), BGR, 0 to 1; output `logits`.

    Raises:
        UserError: the model has a TRN whose gradient map needs autograd.
    """
    trn = model.restore
    if isinstance(trn, TRN) and trn.surrogate is None and "gradient" in trn.stems:
        raise UserError(
            f"{path.suffix}: expected a TRN with a surrogate, found one whose gradient map needs "
            "autograd, which ONNX lacks. Train one with --trn.surrogate, or package a .zip."
        )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its advice is about torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        torch.onnx.export(
            ChannelsReversed(model),
            (torch.zeros(2, 3, model.image_size, model.image_size),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


WRITERS = {".zip": write_zip, ".onnx": write_onnx}


def choose_writer(out: Path) -> Callable[[RobustClassifier, Path], None]:
    """The writer for the ending of `out`.

    Raises:
        UserError: there is none for it, or nothing can be written at `out`.
    """
    write = WRITERS.get(check_writable(out).suffix.lower())
    if write is None:
        found = out.suffix or "no ending"
        raise UserError(f"{out}: expected the ending {' or '.join(WRITERS)}, found {found}.")
    return write


@torch.inference_mode()
def checkpoint_logits(model: RobustClassifier, pixels: np.ndarray, batch: int = 16) -> np.ndarray:
    """(N, num_classes) of uint8 images (N, S, S, 3), RGB."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    batches = tqdm(images.split(batch), unit="batch", desc="checkpoint", leave=False)
    return torch.cat([model(batch) for batch in batches]).numpy()
