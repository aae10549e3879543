"""A classifier as the challenge takes it: a zip, an ONNX file or a program of torch.export."""

import logging
import pprint
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.trn import TRN
from robust_submission.packaging.architecture import WEIGHTS, UnsupportedError, describe

TEMPLATES = Path(__file__).parent / "templates"
BLANK = "CONFIG: dict = {}  # filled in by the packager\n"
FOREVER = (1980, 1, 1, 0, 0, 0)  # the same checkpoint, the same bytes


class ChannelsReversed(nn.Module):
    """The classifier for images in the challenge's order, BGR."""

    def __init__(self, classifier: RobustClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images.flip(1))


def zip_members(model: RobustClassifier) -> dict[str, bytes]:
    """The files of the zip: model.py, the weights, and trn.py where there is a TRN.

    Raises:
        UserError: model.py has no plain-torch twin of a part of the classifier.
    """
    try:
        config = describe(model)
    except UnsupportedError as error:
        raise UserError(
            f"expected a ConvNeXt that plain torch can rebuild, found {error}.\n"
            "It would need timm, which the organisers lack: submit it as ONNX, --out NAME.onnx."
        ) from error
    text = (TEMPLATES / "model.py").read_text()
    assert BLANK in text
    filled = f"CONFIG: dict = {pprint.pformat(config, width=96, sort_dicts=False)}\n"
    weights = save(model.state_dict(), metadata={"format": "pt"})
    members = {"model.py": text.replace(BLANK, filled).encode(), WEIGHTS: weights}
    if config["restore"]:
        members["trn.py"] = (TEMPLATES / "trn.py").read_bytes()
    return members


def write_zip(model: RobustClassifier, path: Path) -> None:
    """Write the package that holds `zip_members`, nothing else, at its top level."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in zip_members(model).items():
            entry = zipfile.ZipInfo(name, date_time=FOREVER)
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3  # Unix, wherever it is written
            deflate = zipfile.ZIP_STORED if name == WEIGHTS else zipfile.ZIP_DEFLATED
            archive.writestr(entry, content, compress_type=deflate)


def _example(model: RobustClassifier) -> tuple[Tensor]:
    return (torch.zeros(2, 3, model.image_size, model.image_size),)


def _check_traceable(model: RobustClassifier) -> None:
    trn = model.restore
    if isinstance(trn, TRN) and trn.surrogate is None and "gradient" in trn.stems:
        raise UserError(
            "expected a TRN with a surrogate: the classifier's own gradient map needs autograd, "
            "which a traced program lacks. Train one with --trn.surrogate, or pack a .zip."
        )


def write_onnx(model: RobustClassifier, path: Path) -> None:
    """Write one ONNX file: input `images` (N, 3, S, S), BGR, 0 to 1; output `logits`."""
    _check_traceable(model)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its advice is about torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        torch.onnx.export(
            ChannelsReversed(model),
            _example(model),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def write_program(model: RobustClassifier, path: Path) -> None:
    """Write a program of torch.export: `torch.export.load(path).module()(images)`, BGR too."""
    _check_traceable(model)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(
        ChannelsReversed(model), _example(model), dynamic_shapes=shapes, strict=False
    )
    torch.export.save(program, path)


WRITERS: dict[str, Callable[[RobustClassifier, Path], None]] = {
    ".zip": write_zip,
    ".onnx": write_onnx,
    ".pt2": write_program,
}
