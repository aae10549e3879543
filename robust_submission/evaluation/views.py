"""What each attacker differentiates: the views of the evaluated model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import normalize

from robust_submission.attacks import PGD, Model, input_gradient
from robust_submission.attacks.losses import LARGEST_GAP, bounded_cross_entropy, margin
from robust_submission.attacks.norms import rescaled
from robust_submission.cli.errors import UserError, log
from robust_submission.data.sources import only_numbers
from robust_submission.evaluation.jobs import ADAPTIVE, Attacker
from robust_submission.evaluation.planted import Readout, find_readout
from robust_submission.models.bpda import BPDA, Through
from robust_submission.models.classifier import (
    RobustClassifier,
    held_draws,
    random_stages,
    reveal,
    set_draw,
    undefended,
)
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import LoadedModel
from robust_submission.models.surgery import Compiled, replaced
from robust_submission.models.trn import TRN
from robust_submission.settings import EvaluationSettings

WAYS_THROUGH = (
    Through.OPERATIONS,
    Through.OPERATIONS | Through.IMAGES,
    Through.OPERATIONS | Through.MASKS | Through.IMAGES,
)
"""What is tried on a model of which nothing is known."""
TRIAL_STEPS = 10
"""Steps of PGD that choose between them."""
ALIKE = 0.999
"""Cosine of two gradients that point the same way."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """The model as it is deployed, and what each attacker differentiates."""

    name: str
    model: Model
    """As deployed: every result is scored on it."""
    seen_by: Mapping[Attacker, Model]
    """What each attacker differentiates. ADAPTIVE has the same predictions as the model, and is the
    model itself if that hides nothing known; ADAPTIVE_BPDA is missing without TRN if no gradient
    was found that needs replacing, TRANSFER if the model has no defences and no other twin was
    given."""
    device: torch.device
    """Where the model and the twin are."""
    image_size: int
    num_classes: int
    random: bool
    """Two calls differ, or a stage draws."""
    repeats: bool = True
    """The global generators decide what the model draws: seeded, it gives the same again."""
    mixes_images: bool | None = False
    """The outputs of an image depend on its place in the batch, or on the other images there; None
    where randomness hides that."""
    softmax: bool
    """The outputs are probabilities instead of logits."""
    differentiable: bool
    """autograd can differentiate the outputs with respect to the images."""
    twin_differentiable: bool = True
    """The same of what the transfer attacker sees."""
    saturates: bool
    """Logits of clean images lie so far apart that cross-entropy loses its gradient."""
    optimises: bool = False
    """The model calls autograd itself when it is called, as TRN and purification do."""
    readouts: Mapping[Attacker, Readout] = field(default_factory=dict)
    """The last layer of what the oblivious and the strongest adaptive attacker see; empty where it
    was not found, or where there is no gradient."""

    @property
    def hides(self) -> bool:
        """Whether the adaptive attacker maximises anything else than the oblivious one."""
        known = self.seen_by[Attacker.ADAPTIVE] is not self.model
        return known or self.random or self.saturates or self.found is not None

    @property
    def found(self) -> BPDA | None:
        """The view with gradients that were found to need replacing; None if there are none."""
        view = self.seen_by.get(Attacker.ADAPTIVE_BPDA)
        return view if isinstance(view, BPDA) else None

    @property
    def strongest(self) -> Attacker:
        """The adaptive attacker with the best gradient, by whom the curves are measured."""
        return Attacker.ADAPTIVE if self.found is None else Attacker.ADAPTIVE_BPDA

    def has_gradient(self, attacker: Attacker) -> bool:
        """Whether the attacker sees a model that autograd can differentiate."""
        if attacker == Attacker.TRANSFER:
            return attacker in self.seen_by and self.twin_differentiable
        bpda = attacker == Attacker.ADAPTIVE_BPDA
        return attacker in self.seen_by and (self.differentiable or bpda)

    def loss(self, attacker: Attacker) -> str:
        """The loss that the attacker maximises, a name of `attacks.LOSSES`."""
        adaptive = attacker in ADAPTIVE and self.saturates
        return "bounded-ce" if adaptive or attacker == Attacker.TRANSFER else "ce"

    def stops_early(self, attacker: Attacker) -> bool:
        """Whether every image that fools what the attacker differentiates also fools the model."""
        alone = not (self.random or self.mixes_images)
        return alone and attacker != Attacker.TRANSFER

    @contextmanager
    def held(self, keys: Tensor) -> Iterator[None]:
        """Have every random stage draw by these keys (B,) for any images of a batch of B."""
        modules = [view for view in self.seen_by.values() if isinstance(view, nn.Module)]
        with held_draws(nn.ModuleList(modules), keys):
            yield

    def compiled(self, mode: str | None) -> "Views":
        """The same views with the backbones of this project's classifiers compiled.

        Not in the view of `BPDA`, which watches their operations, nor in the readouts, which are
        watched by hooks.
        """
        views = {id(view): view for view in (self.model, *self.seen_by.values())}
        parts = nn.ModuleList(each for each in views.values() if isinstance(each, nn.Module))
        backbones = {
            part.backbone: Compiled(part.backbone, mode)
            for part in parts.modules()
            if isinstance(part, RobustClassifier)
        }

        def substitute(part: nn.Module) -> nn.Module | None:
            return part if isinstance(part, BPDA) else backbones.get(part)

        for name, view in views.items():
            views[name] = replaced(view, substitute) if isinstance(view, nn.Module) else view
        seen_by = {attacker: views[id(view)] for attacker, view in self.seen_by.items()}
        return replace(self, model=views[id(self.model)], seen_by=seen_by)

    def set_draw(self, draw: int) -> None:
        """Set the draw of every random stage in every view."""
        for view in (self.model, *self.seen_by.values()):
            if isinstance(view, nn.Module):
                set_draw(view, draw)


class LogProbabilities(nn.Module):
    """Logits of a model that returns probabilities: same predictions, usable gradients."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).float().clamp_min(torch.finfo(torch.float32).tiny).log()


class OnACopy(nn.Module):
    """A model that writes into the images it is given, on a copy of them."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.clone())


def build_views(
    named: LoadedModel,
    twin: Model | None,
    images: Tensor,
    class_names: list[str],
    device: torch.device,
    settings: EvaluationSettings,
) -> Views:
    """Try the model on a few images and prepare its views.

    The model and the twin are moved to the device, set to eval mode and frozen.

    Args:
        named: The model.
        twin: The model to transfer from, without its defences; None for the model itself without
            them.
        images: Some of the evaluated ones, (B, 3, H, W), float32, 0 to 1.
        class_names: The data's, in the order of the logits; where they are only numbers, the model
            may have more.
        device: Where everything runs.
        settings: Norm and epsilon of the attacks.

    Raises:
        UserError: the model fails on the images or does not have one logit per class; or there is
            only one class.
    """
    if len(class_names) < 2:
        raise UserError(f"data: expected at least two classes, found {class_names}.")
    model, images = _prepared(named.model, device), images.to(device)
    count, open_ended = len(class_names), only_numbers(class_names)
    model, outputs = _tried(named.name, model, images, count, open_ended=open_ended)
    if outputs.shape[1] > count:
        log.info("data: labels 0 to %d of the model's %d outputs.", count - 1, outputs.shape[1])
        count = outputs.shape[1]
    if twin is not None:
        twin, answers = _tried("twin", _prepared(twin, device), images, count)
        if _are_probabilities(answers):
            twin = LogProbabilities(twin)
    softmax = _are_probabilities(outputs)
    random, differentiable = _is_random(model, images), _is_differentiable(model, images)
    repeats = not random or _repeats(model, images)
    seen_by = _seen_by(model, twin, softmax)
    other = seen_by.get(Attacker.TRANSFER)
    base = seen_by.get(Attacker.ADAPTIVE_BPDA, seen_by[Attacker.ADAPTIVE])
    found, optimises = _straight_through(base, model, images, settings)
    if found is not None:
        seen_by[Attacker.ADAPTIVE_BPDA] = found
    best = seen_by[Attacker.ADAPTIVE] if found is None else found
    differentiated = _differentiated(best, images, outputs.argmax(dim=1))
    saturates = False
    if differentiated is not None and outputs.shape[1] > 1:
        largest = differentiated[1].topk(2).values
        saturates = bool((largest[:, 0] - largest[:, 1]).max() > LARGEST_GAP)
    views = Views(
        name=named.name,
        model=model,
        seen_by=seen_by,
        device=device,
        image_size=named.image_size,
        num_classes=count,
        random=random,
        repeats=repeats,
        mixes_images=_mixes_images(model, images, random) if repeats else None,
        softmax=softmax,
        differentiable=differentiable,
        twin_differentiable=other is None or _is_differentiable(other, images),
        saturates=saturates,
        optimises=optimises,
    )
    return replace(views, readouts=_readouts(views, images))


def _readouts(views: Views, images: Tensor) -> dict[Attacker, Readout]:
    if not views.has_gradient(views.strongest):
        return {}
    found = dict[Attacker, Readout]()
    for attacker in (Attacker.OBLIVIOUS, views.strongest):
        readout = find_readout(views.seen_by[attacker], images, views.num_classes)
        if readout is None:
            return {}
        found[attacker] = readout
    return found


def _straight_through(
    base: Model, model: Model, images: Tensor, settings: EvaluationSettings
) -> tuple[BPDA | None, bool]:
    """`base` with the gradients replaced that need it, if that makes an attack stronger.

    Tried is what has other gradients than `base` at the images, and kept what fools the model on
    the most images, if those are more than with `base`.

    Returns:
        What is kept, and whether the model was seen to call autograd itself.
    """
    with torch.no_grad():
        predictions = model(images).argmax(dim=1)
    before = _differentiated(base, images, predictions)
    candidates, optimises = list[BPDA](), False
    for through in WAYS_THROUGH:
        view = BPDA(base, through)
        after = _differentiated(view, images, predictions)
        optimises |= view.optimises
        if after is None or not view.substituted or not after[0].any():
            continue
        if before is None or bool((before[0] * after[0]).sum(dim=1).min() < ALIKE):
            candidates.append(view)
    attack = PGD(
        norm=settings.norm, epsilon=settings.epsilon[0], steps=TRIAL_STEPS, loss="bounded-ce"
    )

    def fooled(view: Model) -> int:
        set_seed(settings.seed)
        found = attack(view, images, predictions)
        with torch.no_grad():
            return int((model(found).argmax(dim=1) != predictions).sum())

    best, most = None, -1
    if candidates and before is not None:
        most = fooled(base)
    for view in candidates:
        if most < len(images) and (number := fooled(view)) > most:
            best, most = view, number
    return best, optimises


def _differentiated(view: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradient of each image at length 1, (B, N), and the logits; None if there are none."""
    set_seed(0)
    try:
        with torch.enable_grad():
            gradient, logits = input_gradient(view, images, labels, bounded_cross_entropy)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's code under watch: anything
        if not isinstance(error, UserError):
            log.warning("no gradient of %s: %s", type(view).__name__, str(error)[:80])
        return None
    return normalize(rescaled(gradient.nan_to_num()).flatten(1)), logits


def _seen_by(model: Model, twin: Model | None, softmax: bool) -> dict[Attacker, Model]:
    revealed = reveal(model) if isinstance(model, nn.Module) else model
    seen = {
        Attacker.OBLIVIOUS: model,
        Attacker.ADAPTIVE: LogProbabilities(revealed) if softmax else revealed,
    }
    if isinstance(model, nn.Module) and any(isinstance(stage, TRN) for stage in model.modules()):
        bypassed = reveal(model, bypass=True)
        seen[Attacker.ADAPTIVE_BPDA] = LogProbabilities(bypassed) if softmax else bypassed
    softmax, twin = (softmax, model) if twin is None else (False, twin)
    other = undefended(twin) if isinstance(twin, nn.Module) else twin
    if other is not model:
        seen[Attacker.TRANSFER] = LogProbabilities(other) if softmax else other
    return seen


def _prepared(model: Model, device: torch.device) -> Model:
    if isinstance(model, nn.Module):
        optimize_for_cpu(model, channels_last=device.type == "cpu", one_size=False)
        for weight in model.parameters():  # a ScriptModule has no requires_grad_
            weight.requires_grad_(False)
        return model.to(device).eval()
    return model


def device_of(named: LoadedModel, images: Tensor, device: torch.device) -> torch.device:
    """Where a model computes: on `device`; on the CPU, if it is a function that does so only there.

    Args:
        named: The model.
        images: Some images for it, (B, 3, H, W), float32, 0 to 1, on the CPU.
        device: Where a module can be moved to.
    """
    if isinstance(named.model, nn.Module) or device.type == "cpu":
        return device
    for place in (device, torch.device("cpu")):
        try:
            with torch.no_grad():
                named.model(images.to(place, copy=True))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the user's code: anything
            continue
        if place != device:
            log.info("%s computes on the CPU.", named.name)
        return place
    return device  # where `try_model` says what is wrong


def _tried(
    name: str, model: Model, images: Tensor, num_classes: int, *, open_ended: bool = False
) -> tuple[Model, Tensor]:
    """The model, `OnACopy` if it writes into its images, and its outputs; see `try_model`."""
    given = images.clone()
    outputs = try_model(name, model, given, num_classes, open_ended=open_ended)
    return (model if torch.equal(given, images) else OnACopy(model)), outputs


def try_model(
    name: str,
    model: Model,
    images: Tensor,
    num_classes: int | None = None,
    *,
    open_ended: bool = False,
) -> Tensor:
    """The model's outputs (B, num_classes) on a few images.

    Args:
        name: What to call the model in a message.
        model: Any callable.
        images: (B, 3, H, W), float32, 0 to 1.
        num_classes: The expected number of outputs; None for any.
        open_ended: There may be more.

    Raises:
        UserError: the model raises an error, or its outputs have another shape.
    """
    shape = tuple(images.shape)
    try:
        with torch.no_grad():
            logits = model(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's code: anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "does not require grad" in reason:
            reason += "; its weights are frozen: give a model that trains itself as a function"
        raise UserError(f"{name}: expected logits of images {shape}, found: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{name}: expected logits (B, classes) of images {shape}, found {found}.")
    fits = num_classes in (None, logits.shape[1])
    if not fits and not (open_ended and num_classes and logits.shape[1] > num_classes):
        raise UserError(
            f"{name}: expected one logit for each of the data's {num_classes} classes, "
            f"found {logits.shape[1]}."
        )
    return logits


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether every row is a probability distribution."""
    near_one = (outputs.float().sum(dim=1) - 1).abs().max() < 1e-3
    return bool(near_one and outputs.min() >= 0 and outputs.max() <= 1 + 1e-5)


def _is_random(model: Model, images: Tensor) -> bool:
    if isinstance(model, nn.Module) and random_stages(model):
        return True
    with torch.no_grad():
        return not _are_close(model(images), model(images), 1e-4)


def _repeats(model: Model, images: Tensor) -> bool:
    """Whether a random model draws the same again after the global generators were seeded."""
    return _are_close(_drawn(model, images), _drawn(model, images), 1e-4)


def _drawn(model: Model, images: Tensor) -> Tensor:
    """A random model's outputs at one draw."""
    if isinstance(model, nn.Module):
        set_draw(model, 0)
    set_seed(0)
    with torch.no_grad():
        return model(images)


def _mixes_images(model: Model, images: Tensor, random: bool) -> bool:
    """Whether the first image has other outputs among black images, in the last place.

    In a random model it keeps the first place, as each place may have a draw of its own. The batch
    has the same size, for which a processor computes in the same way.
    """
    image, black = images[:1], torch.zeros_like(images[1:])
    if random:
        first, other = _drawn(model, images)[:1], _drawn(model, torch.cat([image, black]))[:1]
    else:
        with torch.no_grad():
            first, other = model(images)[:1], model(torch.cat([black, image]))[-1:]
    return not _are_close(first, other, 1e-3)


def _are_close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether two outputs differ by no more than `tolerance` of the largest one."""
    first, second = first.float(), second.float()
    scale = first.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(first, second, rtol=0, atol=tolerance * scale, equal_nan=True)


def _is_differentiable(model: Model, images: Tensor) -> bool:
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    try:
        with torch.enable_grad():
            input_gradient(model, images, labels, margin)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError):  # autograd's own, of operations without a derivative
        return False
    return True
