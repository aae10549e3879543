"""The view of a model that automatic BPDA gives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robust_submission.models.bpda.gradients import in_order, response
from robust_submission.models.bpda.operations import Through
from robust_submission.models.bpda.watch import Watch

NOISE = 0.03
"""Standard deviation of the noise by which a map of images is measured: an attack's usual size."""
MEASURED = 4
"""How often each image is given with noise."""


class BPDA(nn.Module):
    """A model with the gradient passed straight through what hides it.

    With gradients, gives the model's outputs, or the first values in the same order that they were
    made from, as the logits before a softmax; predictions are the model's.

    Args:
        model: From images (B, 3, H, W), float32, 0 to 1, to outputs (B, num_classes).
        through: What to look for.
    """

    substituted: tuple[str, ...] = ()
    """What was found in the last pass that recorded gradients: "round in masked.py:21"."""
    optimises: bool = False
    """Whether the model called autograd itself in that pass."""
    _join: int | None
    """Number of the tensor that is linked to the images; see `Watch`."""
    _passed: Tensor | None
    """How that tensor follows the images, as `response` gives it."""
    _raw: int | None
    """Number of the outputs before squashing among `Watch.rows`; -1 for none."""

    def __init__(self, model: Callable[[Tensor], Tensor], through: Through) -> None:
        super().__init__()
        self.model = model
        self.through = through
        # Found in the first pass, then kept: results must not depend on the batch.
        self._join = self._raw = self._passed = None

    def forward(self, images: Tensor) -> Tensor:
        if not (images.requires_grad and torch.is_grad_enabled()):
            return self.model(images)
        if self._raw is None:
            outputs, watch = self._watched(images)
            self._raw = _before_squashing(watch.rows, outputs)
            self._join = watch.last_made if Through.IMAGES in self.through else None
            self._passed = self._measured(images) if self._join else None
        outputs, watch = self._watched(images)
        number = self._raw
        kept = 0 <= number < len(watch.rows) and watch.rows[number].shape == outputs.shape
        if number >= 0 and not kept:  # the last layer is another now
            number = _before_squashing(watch.rows, outputs)
        if number >= 0 and watch.rows[number] is not outputs:
            outputs = _unsquashed(outputs, watch.rows[number])
            watch.found["what squashes the outputs"] = None
        self.substituted, self.optimises = tuple(watch.found), watch.optimises
        return outputs

    def _measured(self, images: Tensor) -> Tensor | None:
        """How the tensor that is linked to the images follows them; None if it is not there."""
        generator, points = torch.Generator().manual_seed(0), [images.detach()]
        for _ in range(MEASURED):
            noise = torch.randn(images.shape, generator=generator).to(images)
            points.append((points[0] + NOISE * noise).clamp(0, 1))
        joined = [self._watched(each.clone().requires_grad_())[1].joined for each in points]
        found = [each for each in joined if each is not None]
        if len(found) < len(points):
            return None
        changes = torch.cat([each - points[0] for each in points[1:]])
        responses = torch.cat([each - found[0] for each in found[1:]])
        return response(changes, responses.float())

    def _watched(self, images: Tensor) -> tuple[Tensor, Watch]:
        watch = Watch(images.view_as(images), self.through, self._join, self._passed)
        with without_backward_hooks(self.model) as hooked, watch:
            outputs = self.model(watch.images)
        watch.found |= dict.fromkeys(hooked)
        return watch.with_gradient(outputs), watch


def _before_squashing(rows: Sequence[Tensor], outputs: Tensor) -> int:
    """Number of the first tensor whose classes are in the outputs' order everywhere; else -1."""
    found = (number for number, raw in enumerate(rows) if in_order(raw, outputs).all())
    return next(found, -1)


def _unsquashed(outputs: Tensor, raw: Tensor) -> Tensor:
    """What was squashed to these outputs, (B, num_classes), with the predictions of the outputs."""
    raw, predicted = raw.to(outputs.dtype), outputs.argmax(dim=1, keepdim=True)
    # Values that are equal when squashed: the prediction stays the model's.
    lead = (raw.amax(dim=1, keepdim=True) - raw.gather(1, predicted)).detach()
    raw = raw.scatter_add(1, predicted, lead * (1 + 1e-3))
    return torch.where(in_order(raw, outputs)[:, None], raw, outputs)


@contextmanager
def without_backward_hooks(model: Callable[[Tensor], Tensor]) -> Iterator[list[str]]:
    """Call the model without the hooks that change its modules' gradients; yields their owners."""
    kept, names = list[tuple[dict, dict]](), list[str]()
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for hooks in (module._backward_hooks, module._backward_pre_hooks):
            if hooks:
                kept.append((hooks, dict(hooks)))
                names.append(f"a backward hook of {type(module).__name__}")
                hooks.clear()
    try:
        yield names
    finally:
        for hooks, before in kept:
            hooks.update(before)
