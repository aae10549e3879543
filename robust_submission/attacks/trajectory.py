"""What happens in a run of PGD, step by step: why an attack failed (Pintor et al., NeurIPS 2022).

path = Trajectory(labels, cross_entropy)
points = PGD(observe=path)(model, images, labels)
path.end(points, model(points))
path.fooled, path.silent, path.rise, path.cosine
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from robust_submission.attacks.base import correct
from robust_submission.attacks.losses import Loss
from robust_submission.attacks.norms import rescaled


@dataclass(eq=False)
class Trajectory:
    """Observes PGD without early stop, on one batch."""

    labels: Tensor
    """(B,), int64."""
    loss: Loss
    first: Tensor = field(init=False)
    """(B, 3, H, W): the first point that fools the observed model, else the last point."""
    fooled: Tensor = field(init=False)
    """(B,) bool: whether any point fools it."""
    silent: Tensor = field(init=False)
    """(B,) bool: whether a point fools it, but the last does not."""
    _losses: list[Tensor] = field(default_factory=list)
    _cosines: list[Tensor] = field(default_factory=list)
    _direction: Tensor | None = None

    def __call__(self, points: Tensor, gradient: Tensor, logits: Tensor) -> None:
        """Note one step; `gradient` is that of the loss at `points`."""
        self._note(points, logits)
        direction = normalize(rescaled(gradient.nan_to_num()).double().flatten(1))
        if self._direction is not None:
            cosine = (direction * self._direction).sum(dim=1)
            known = direction.any(dim=1) & self._direction.any(dim=1)
            self._cosines.append(torch.where(known, cosine, torch.nan))
        self._direction = direction

    def end(self, points: Tensor, logits: Tensor) -> None:
        """Note the point that PGD returned."""
        last = self._note(points, logits)
        self.first = torch.where(self.fooled[:, None, None, None], self.first, points)
        self.silent = self.fooled & ~last

    @property
    def cosine(self) -> Tensor:
        """(B,): the mean cosine of successive gradients; NaN where there were not two."""
        nothing = torch.full_like(self.labels, torch.nan, dtype=torch.float64)
        return torch.stack([nothing, *self._cosines]).nanmean(dim=0)

    @property
    def rise(self) -> Tensor:
        """(B,): by how much the mean loss of the last quarter of steps exceeds that of the quarter
        before, in units of its whole rise: a quarter where it rises steadily, none where it has
        converged. NaN with fewer than four steps or no rise."""
        losses = torch.stack(self._losses).double()
        quarter = len(losses) // 4
        if quarter == 0:
            return torch.full_like(losses[0], torch.nan)
        late, before = losses[-quarter:].mean(dim=0), losses[-2 * quarter : -quarter].mean(dim=0)
        whole = losses.amax(dim=0) - losses[0]
        return torch.where(whole > 0, (late - before) / whole, torch.nan)

    def _note(self, points: Tensor, logits: Tensor) -> Tensor:
        fooled = ~correct(logits, self.labels)
        if not self._losses:
            self.first, self.fooled = points.detach().clone(), torch.zeros_like(fooled)
        new = fooled & ~self.fooled  # rows[new] would wait for the device
        self.first = torch.where(new[:, None, None, None], points.detach(), self.first)
        self.fooled = self.fooled | new
        self._losses.append(self.loss(logits.detach(), self.labels))
        return fooled
