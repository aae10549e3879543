"""The evaluated model, tried out, and the views of it that attackers get."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_submission.attacks import input_gradient
from robust_submission.attacks.base import Model
from robust_submission.attacks.losses import margin
from robust_submission.cli.errors import UserError
from robust_submission.evaluation.cache import module_digest
from robust_submission.models.classifier import random_stages, reveal, set_draw, undefended
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.gcm import GCM
from robust_submission.models.load import LoadedModel
from robust_submission.models.trn import TRN


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model as it is deployed, and what attackers look at."""

    name: str
    model: Model
    """As deployed: what every result is scored on."""
    revealed: Model
    """Honest gradients and the same predictions; the model itself where it hides nothing known."""
    bypassed: Model | None = None
    """The same with the gradient passed straight through TRN too; None where there is no TRN."""
    twin: Model | None
    """Another model, or this one, without its defences; None where this one has none and no other
    was named."""
    image_size: int
    num_classes: int
    random: bool
    """Two calls differ, or a stage draws."""
    softmax: bool
    """Its outputs are probabilities, not logits."""
    differentiable: bool
    """autograd can follow its outputs back to the images."""

    @property
    def hides(self) -> bool:
        """Whether the adaptive attacker sees anything else than the oblivious one."""
        return self.random or self.revealed is not self.model

    def set_draw(self, draw: int) -> None:
        """Put a draw in force in every random stage, of the revealed model and the twin too."""
        for view in (self.model, self.revealed, self.bypassed, self.twin):
            if isinstance(view, nn.Module):
                set_draw(view, draw)

    def describe(self) -> dict[str, Any]:
        """What the report says of the model."""
        module = self.model if isinstance(self.model, nn.Module) else None
        modules = [] if module is None else list(module.modules())
        stages = [repr(each) for each in modules if isinstance(each, GCM)]
        stages += [] if module is None else [repr(stage) for stage in random_stages(module)]
        stages += [each.summary() for each in modules if isinstance(each, TRN)]
        return {
            "name": self.name,
            "parameters": None if module is None else sum(map(Tensor.numel, module.parameters())),
            "stages": stages,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            "random": self.random,
            "outputs": "probabilities" if self.softmax else "logits",
            "digest": None if module is None else module_digest(module),
        }


class LogProbabilities(nn.Module):
    """Logits for a model that gives probabilities: the same predictions, usable gradients."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).float().clamp_min(torch.finfo(torch.float32).tiny).log()


def build_target(
    named: LoadedModel,
    twin: Model | None,
    images: Tensor,
    class_names: list[str],
    device: torch.device,
) -> Target:
    """Try the model on a few images and prepare its views.

    Args:
        named: The model.
        twin: A model to transfer from, without its defences; the model itself without them if None.
        images: Some of the evaluated ones, (B, 3, H, W).
        class_names: The data's.
        device: Where everything runs.

    Raises:
        UserError: the model does not take the images, has not one logit a class, or has the
            data's classes in another order; or there is but one class.
    """
    if len(class_names) < 2:
        raise UserError(f"expected data of two classes at least, found {class_names}.")
    _check_order(named, class_names)
    model = _ready(named.model, device)
    images = images.to(device)
    _check_logits(named.name, _try(named.name, model, images), class_names)
    if twin is not None:
        twin = _ready(twin, device)
        _check_logits("--twin", _try("--twin", twin, images), class_names)
    else:
        twin = model if isinstance(model, nn.Module) else None
    if isinstance(twin, nn.Module):
        twin = undefended(twin)
    softmax = _probabilities(_try(named.name, model, images))
    revealed, bypassed = model, None
    if isinstance(model, nn.Module):
        revealed = reveal(model)
        if any(isinstance(stage, TRN) for stage in model.modules()):
            bypassed = reveal(model, bypass=True)
    return Target(
        name=named.name,
        model=model,
        revealed=LogProbabilities(revealed) if softmax else revealed,
        bypassed=bypassed,
        twin=None if twin is model else twin,
        image_size=named.image_size,
        num_classes=len(class_names),
        random=_is_random(model, images),
        softmax=softmax,
        differentiable=_differentiable(model, images),
    )


def _ready(model: Model, device: torch.device) -> Model:
    if isinstance(model, nn.Module):
        optimize_for_cpu(model, channels_last=device.type == "cpu", one_size=False)
        return model.to(device).eval().requires_grad_(False)
    return model


def _try(name: str, model: Model, images: Tensor) -> Tensor:
    shape = tuple(images.shape)
    try:
        with torch.no_grad():
            logits = model(images)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: expected logits of images {shape}, found: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{name}: expected logits (B, classes) of images {shape}, found {found}.")
    return logits


def _check_order(named: LoadedModel, class_names: list[str]) -> None:
    trained = named.class_names or class_names
    if trained != class_names and sorted(trained) == sorted(class_names):
        first = next(i for i, name in enumerate(trained) if name != class_names[i])
        raise UserError(
            f"{named.name}: expected the data's classes in the model's order (label {first} is "
            f"{trained[first]!r}), found {class_names[first]!r} in its place."
        )


def _check_logits(name: str, logits: Tensor, class_names: list[str]) -> None:
    if logits.shape[1] != len(class_names):
        raise UserError(
            f"{name}: expected one logit for each of the data's {len(class_names)} classes, "
            f"found {logits.shape[1]}."
        )


def _probabilities(outputs: Tensor) -> bool:
    """Whether every row is a probability distribution."""
    near_one = (outputs.float().sum(dim=1) - 1).abs().max() < 1e-3
    return bool(near_one and outputs.min() >= 0 and outputs.max() <= 1 + 1e-5)


def _is_random(model: Model, images: Tensor) -> bool:
    if isinstance(model, nn.Module) and random_stages(model):
        return True
    with torch.no_grad():
        first, second = model(images).float(), model(images).float()
    scale = max(1.0, first.nan_to_num(0, 0, 0).abs().max().item())
    return not torch.allclose(first, second, rtol=0, atol=1e-4 * scale, equal_nan=True)


def _differentiable(model: Model, images: Tensor) -> bool:
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    try:
        with torch.enable_grad():
            input_gradient(model, images, labels, margin)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError):  # autograd's own, of operations without a derivative
        return False
    return True
