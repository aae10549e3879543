"""Load a submission as models to attack: as it is, with its masking revealed, and undefended.

Loading a zip runs its model.py in this process. check.py runs a stranger's in a limited one, but
attacks need its gradients thousands of times; so a zip is loaded here only if it is byte for byte
what package.py makes of a checkpoint, or if the user trusts it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from robust_submission.attacks import EOT, Model
from robust_submission.checker.unpack import RefusedError, unpack
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import scratch_folder
from robust_submission.data.sources import only_numbers
from robust_submission.models.classifier import RobustClassifier, undefended
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.surgery import StraightThrough, replaced
from robust_submission.models.trn import TRN, DifferentiableTRN
from robust_submission.packaging.export import ChannelsReversed, zip_files

EOT_DRAWS = range(1, 9)  # answers are given with draw 0


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A submission as models of RGB images (B, 3, S, S), 0 to 1."""

    model: Model
    """As it was submitted."""
    revealed: Model
    """With honest gradients, where its masking is known; else the model itself."""
    twin: Model | None
    """Without its defences, or another model to transfer attacks from."""
    differentiable: bool
    """Whether autograd can follow it."""
    known: bool
    """Whether it is what package.py makes of a checkpoint: `revealed` reveals all its masking."""


@contextmanager
def loaded_submission(
    path: Path,
    *,
    origin: RobustClassifier | None = None,
    twin: nn.Module | None = None,
    trust: bool = False,
) -> Iterator[Submission]:
    """Yield a submission; what its code imports is there until the block ends.

    Args:
        path: A .zip or .onnx file.
        origin: The classifier that the submission was made of. A zip that differs from what
            package.py makes of it is refused.
        twin: A model to transfer attacks from, instead of the submission without its defences.
        trust: Run the code of a zip whatever it is.

    Raises:
        UserError: there is no such file, it may not be run, or it does not load.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a submission, found nothing there.")
    if path.suffix.lower() == ".onnx":
        model = _load_onnx(path)
        twin = twin or (undefended(origin) if origin else None)
        yield Submission(
            model=model, revealed=model, twin=_frozen(twin), differentiable=False, known=False
        )
        return
    with scratch_folder("score-") as folder:
        try:
            files = unpack(path, folder)
        except RefusedError as error:
            raise UserError(f"{path}: {error}.") from error
        known = origin is not None and _is_made_of(origin, files, folder)
        if not known and not trust:
            raise UserError(
                f"{path}: expected what package.py makes of --checkpoint, found another package.\n"
                "Scoring runs its code in this process: try check.py --container, read it, --trust."
            )
        with _imports_from(folder):
            yield _views(_load_zip(path), twin, known)


def _is_made_of(origin: RobustClassifier, files: list[str], folder: Path) -> bool:
    expected = zip_files(origin)
    same = sorted(files) == sorted(expected)
    return same and all((folder / name).read_bytes() == expected[name] for name in expected)


def require_logits(path: Path, model: Model, image_size: int, class_names: Sequence[str]) -> None:
    """Raise a UserError unless the model gives one logit per class for an image of that size.

    Or more, where the classes are only numbers.
    """
    try:
        logits = model(torch.zeros(1, 3, image_size, image_size))
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything
        raise _unfit(path, error) from error
    count, several = len(class_names), only_numbers(class_names)
    fits = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == 1
    if not fits or not (logits.shape[1] == count or (several and logits.shape[1] > count)):
        shape = getattr(logits, "shape", [f"a {type(logits).__name__}"])
        found = " x ".join(map(str, shape))
        raise UserError(f"{path}: expected logits 1 x {count}, found {found}.")


def _unfit(path: Path, error: BaseException) -> UserError:
    found = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"{path}: expected a submission that check.py passes, found {found}")


def _load_zip(path: Path) -> nn.Module:
    """`Model()` of the unpacked zip, in eval mode, frozen."""
    try:
        model = importlib.import_module("model").Model().float().eval()
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything
        raise _unfit(path, error) from error
    optimize_for_cpu(model, channels_last=True)
    return model.requires_grad_(False)


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Import what the folder holds from there, and leave this process's modules as they were.

    The modules of two submissions, and those of other projects, may have the same names.
    """
    tops = {path.stem for path in folder.iterdir()}

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in tops]
        return {name: sys.modules.pop(name) for name in names}

    others = take_out()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        take_out()
        sys.modules.update(others)


def _frozen(model: nn.Module | None) -> nn.Module | None:
    return None if model is None else model.eval().requires_grad_(False)


def _views(package: nn.Module, twin: nn.Module | None, known: bool) -> Submission:
    """The views of a zip; of another's package, `revealed` finds the stages with our names."""
    restore, conceal, randomize = (
        getattr(package, name, None) for name in ("restore", "conceal", "randomize")
    )
    model = revealed = ChannelsReversed(package)
    if isinstance(conceal, nn.Module) and isinstance(randomize, nn.Module):
        honest: dict[nn.Module, nn.Module] = {conceal: StraightThrough(conceal)}
        bare: dict[nn.Module, nn.Module] = {conceal: nn.Identity(), randomize: nn.Identity()}
        if isinstance(restore, nn.Module) and hasattr(restore, "gradient_map"):
            honest[restore] = DifferentiableTRN(cast(TRN, restore))  # the zip's copy of that class
            bare[restore] = nn.Identity()
        revealed = _expectation(ChannelsReversed(replaced(package, honest.get)), randomize)
        twin = twin or ChannelsReversed(replaced(package, bare.get))
    return Submission(
        model=model, revealed=revealed, twin=_frozen(twin), differentiable=True, known=known
    )


def _expectation(model: nn.Module, randomize: nn.Module) -> Model:
    """The model's average over draws other than that of its answers; itself without draws."""
    if not hasattr(randomize, "draw"):
        return model

    def set_draw(draw: int) -> None:
        vars(randomize)["draw"] = draw

    average = EOT(model, EOT_DRAWS, set_draw)

    def call(images: Tensor) -> Tensor:
        try:
            return average(images)
        finally:
            set_draw(0)

    return call


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors are Exceptions and nothing narrower
        raise _unfit(path, error) from error
    name, fixed = session.get_inputs()[0].name, session.get_inputs()[0].shape[0]

    def call(images: Tensor) -> Tensor:
        size = fixed if isinstance(fixed, int) else len(images)
        logits: list[Tensor] = []
        for part in images.detach().cpu().flip(1).split(size):
            batch = np.resize(part.numpy(), (size, *part.shape[1:]))  # repeated to fill the batch
            found = np.asarray(session.run(None, {name: batch})[0])[: len(part)]
            logits.append(torch.from_numpy(found.copy()))
        return torch.cat(logits)

    return call
