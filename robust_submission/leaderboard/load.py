"""A package, loaded to be attacked: as it is, with its known masks off, and its undefended twin.

Loading a package runs its model.py in this process. check.py runs a stranger's in a bounded one,
but attacks need its gradients thousands of times over; so a package is loaded here only if it is
byte for byte what package.py makes of a checkpoint, or if the caller vouches for it.
"""

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from robust_submission.attacks import EOT
from robust_submission.attacks.base import Model
from robust_submission.checker.unpack import RefusedError, unpack
from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier, undefended
from robust_submission.models.load import load_checkpoint
from robust_submission.models.surgery import StraightThrough, replaced
from robust_submission.packaging.export import zip_members

EOT_DRAWS = range(1, 9)  # draw 0 is the one that is judged


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Views of a package; each takes RGB images in 0 to 1."""

    model: Model
    """As handed in."""
    revealed: Model
    """With honest gradients, where it hides them in a way that we know; else the model."""
    twin: Model | None
    """Its undefended twin, or another model to transfer from."""
    differentiable: bool
    """Whether autograd can follow it."""
    known: bool
    """Whether its stages bear the names by which `revealed` finds them."""


class _Reversed(nn.Module):
    """RGB images for a model that takes BGR."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.flip(1)).float()


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a package is said to be made of."""

    checkpoint: Path | None = None
    """The run of its classifier."""
    trn: Path | None = None
    """The run of its TRN."""

    def load(self) -> RobustClassifier | None:
        """The classifier; None where no run was named."""
        return load_checkpoint(self.checkpoint, self.trn) if self.checkpoint else None


def load_contestant(
    package: Path, folder: Path, origin: Origin, twin: Path | None, trust: bool
) -> Contestant:
    """Load a package.

    Args:
        package: A .zip or .onnx file.
        folder: An empty one, to unpack in; it must stay.
        origin: The runs that it was made of.
        twin: A checkpoint to transfer from, instead of the package's own undefended twin.
        trust: Run its model.py though it is not what package.py makes of the checkpoint.

    Raises:
        UserError: no such package, one that is not vouched for, or one that does not load.
    """
    if not package.is_file():
        raise UserError(f"{package}: expected a submission, found nothing there.")
    other = undefended(load_checkpoint(twin)) if twin else None
    if package.suffix.lower() == ".onnx":
        model = _onnx(package)
        if other is None and (made_of := origin.load()) is not None:
            other = undefended(made_of)
        return Contestant(
            model=model, revealed=model, twin=_frozen(other), differentiable=False, known=False
        )
    try:
        files = unpack(package, folder)
    except RefusedError as error:
        raise UserError(f"{package}: {error}.") from error
    if not trust and not _made_of(files, folder, origin):
        raise UserError(
            f"{package}: expected what package.py makes of --checkpoint, found another package.\n"
            "Scoring runs its code in this process: check it with check.py, read it, then --trust."
        )
    return _views(_load(package, folder), other)


def _made_of(files: list[str], folder: Path, origin: Origin) -> bool:
    if (model := origin.load()) is None:
        return False
    expected = zip_members(model)
    same = sorted(files) == sorted(expected)
    return same and all((folder / name).read_bytes() == expected[name] for name in expected)


def _load(package: Path, folder: Path) -> nn.Module:
    """`Model()` of the unpacked package."""
    spec = importlib.util.spec_from_file_location("model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
        sys.modules.pop("trn", None)  # another package's
        model = module.Model().float().eval()
    except Exception as error:  # a stranger's code may raise anything
        raise unfit(package, error) from error
    finally:
        sys.path.remove(str(folder))
    return model.requires_grad_(False)


def unfit(package: Path, error: Exception) -> ValueError:
    """What is said of a package that raises `error`."""
    found = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"{package}: expected a submission that check.py passes, found {found}")


def _frozen(model: nn.Module | None) -> nn.Module | None:
    return None if model is None else model.eval().requires_grad_(False)


def _views(package: nn.Module, other: nn.Module | None) -> Contestant:
    conceal, randomize = (getattr(package, name, None) for name in ("conceal", "randomize"))
    restore = getattr(package, "restore", None)
    known = isinstance(conceal, nn.Module) and isinstance(randomize, nn.Module)
    honest, bare = package, package
    if known:
        honest = replaced(package, lambda each: StraightThrough(each) if each is conceal else None)
        if isinstance(restore, nn.Module):
            honest = _with_restore(honest, _differentiable(restore))
            bare = _with_restore(bare, None)
        hiding = (conceal, randomize)
        bare = replaced(
            bare, lambda each: nn.Identity() if any(each is one for one in hiding) else None
        )
    revealed: Model = _Reversed(honest)
    if hasattr(randomize, "draw"):
        revealed = _expectation(_Reversed(honest), randomize)
    twin = other or (_Reversed(bare) if known else None)
    return Contestant(
        model=_Reversed(package),
        revealed=revealed,
        twin=_frozen(twin),
        differentiable=True,
        known=known,
    )


def _with_restore(package: nn.Module, restore: nn.Module | None) -> nn.Module:
    changed = copy.copy(package)
    changed._modules = {**package._modules, "restore": restore}
    return changed


def _differentiable(restore: nn.Module) -> nn.Module:
    """The package's TRN with its gradient map differentiated too."""
    changed = copy.copy(restore)
    changed.differentiable = True  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return changed


def _expectation(model: nn.Module, randomize: Any) -> Model:
    """The model's average over draws that it is not judged on."""

    def set_draw(draw: int) -> None:
        randomize.draw = draw

    expected = EOT(model, EOT_DRAWS, set_draw)

    def call(images: Tensor) -> Tensor:
        try:
            return expected(images)
        finally:
            randomize.draw = 0

    return call


def _onnx(package: Path) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(package, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors are Exceptions and nothing narrower
        raise unfit(package, error) from error
    name, fixed = session.get_inputs()[0].name, session.get_inputs()[0].shape[0]

    def call(images: Tensor) -> Tensor:
        size = fixed if isinstance(fixed, int) else len(images)
        found = list[Tensor]()
        for part in images.detach().cpu().flip(1).split(size):
            whole = np.resize(part.numpy(), (size, *part.shape[1:]))  # filled up with the same
            logits = np.asarray(session.run(None, {name: whole})[0])[: len(part)]
            found.append(torch.from_numpy(logits.copy()))
        return torch.cat(found)

    return call
