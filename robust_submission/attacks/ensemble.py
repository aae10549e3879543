"""Several attacks as one (worst case per image), and a random model as its average (EOT)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from robust_submission.attacks.base import Attack, Model, attacking, correct
from robust_submission.attacks.losses import cross_entropy

UNCLEAR = 0.01
"""Probability up to which a decision that counts as clear may be wrong, by Student's t-test."""


@dataclass(frozen=True)
class WorstPoints:
    """The worst point so far of each image: one that fools before one that does not, then by loss.

    `update` writes into the tensors.
    """

    points: Tensor
    """(B, 3, H, W)."""

    losses: Tensor
    """(B,)."""

    fooled: Tensor
    """(B,) bool."""

    def update(self, rows: Tensor, points: Tensor, losses: Tensor, fooled: Tensor) -> None:
        """Compare with new points of some images; `rows` (N,) are their places in the batch."""
        before = self.fooled[rows]
        worse = (fooled & ~before) | ((fooled == before) & (losses > self.losses[rows]))
        places = rows[worse]
        self.points[places], self.losses[places] = points[worse], losses[worse]
        self.fooled[places] = fooled[worse]


@dataclass(frozen=True)
class WorstCaseResult:
    """The worst case of each image, and what caused it."""

    images: Tensor
    """(B, 3, H, W): the example that fools the model, else the tried one of largest loss."""

    fooled_by: list[str]
    """The attack that fooled the model, "clean" where it was wrong without one, "" where none."""

    losses: Tensor
    """(B,): the cross-entropies of `images`."""

    @property
    def robust(self) -> Tensor:
        """(B,) bool: whether the model is right despite every attack."""
        return torch.tensor([not name for name in self.fooled_by], dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """The worst case per image over several untargeted attacks; itself an attack.

    An image that the model gets wrong is left unchanged. Each attack sees only the images that
    withstood the earlier ones: give seeds, so that the draws for an image do not depend on which
    others are left.
    """

    attacks: Mapping[str, Attack]
    """Attacks by name, best the cheap ones first."""

    def __post_init__(self) -> None:
        if not self.attacks:
            raise ValueError("attacks: expected at least one, found none.")
        if any(getattr(attack, "targeted", False) for attack in self.attacks.values()):
            raise ValueError("attacks: expected untargeted ones only, found a targeted one.")

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Attack a batch: see `Attack`."""
        return self.run(model, images, labels, generator, seeds=seeds).images

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        seeds: Tensor | None = None,
        scored_on: Model | None = None,
    ) -> WorstCaseResult:
        """Attack a batch and report which attack fooled the model on which image.

        `scored_on` is the model to be fooled, where the attacks differentiate another, as in an
        adaptive or a transfer attack. The other arguments are those of `Attack`.
        """
        scored_on = scored_on or model
        with attacking(images, labels) as (images, labels), torch.no_grad():
            worst = WorstPoints(images.clone(), *_score(scored_on, images, labels))
            fooled_by = ["clean" if fooled else "" for fooled in worst.fooled.tolist()]
            for name, attack in self.attacks.items():
                rows = (~worst.fooled).nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                some = None if seeds is None else seeds[rows.to(seeds.device)]
                points = attack(model, images[rows], labels[rows], generator, seeds=some)
                losses, fooled = _score(scored_on, points, labels[rows])
                worst.update(rows, points, losses, fooled)
                for row in rows[fooled].tolist():
                    fooled_by[row] = name
        return WorstCaseResult(worst.points, fooled_by, worst.losses)


def _score(model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies (B,), and whether the model is fooled (B,)."""
    logits = model(images).float()
    return cross_entropy(logits, labels), ~correct(logits, labels)


@dataclass(frozen=True)
class EOT:
    """A model that averages the probabilities of several draws of a random model.

        attack(EOT(model, range(20), set_draw), images, labels)

    Returns the logarithm of the average probabilities, (B, num_classes). Cross-entropy is then
    -log of the average probability of the label, and its gradient that of an expectation over
    transformations (Athalye et al. 2018). Averaging logits would let one confident draw outvote
    many. Keeps the graphs of all draws at once: memory grows with their number. Leaves the model at
    its last draw.
    """

    model: Model
    """The random model: images (B, 3, H, W) to logits."""

    draws: Sequence[int]
    """The draws to average over, such as `range(20)`; score on other draws than you attack."""

    set_draw: Callable[[int], object]
    """`set_draw(k)` makes the model use its k-th draw from then on."""

    enough: int | None = None
    """Draws after which an image gets no more if its decision is clear: if the two largest average
    probabilities differ by more than chance explains (t-test over the draws, one-sided, error
    `UNCLEAR`). At least 2; None gives every image all draws."""

    def __post_init__(self) -> None:
        if not len(self.draws):
            raise ValueError("draws: expected at least one, found none.")
        if self.enough is not None and self.enough < 2:
            raise ValueError(f"enough: expected at least 2 draws or None, found {self.enough}.")

    def __call__(self, images: Tensor) -> Tensor:
        first = self._drawn(images, self.draws[: self.enough])
        average = first.logsumexp(dim=0) - math.log(len(first))
        if len(first) == len(self.draws):
            return average
        rows = _unclear(first.detach()).nonzero().squeeze(1)
        if len(rows) == 0:
            return average
        others = self._drawn(images[rows], self.draws[self.enough :])
        every = torch.cat([first[:, rows], others])
        return average.index_copy(0, rows, every.logsumexp(dim=0) - math.log(len(every)))

    def _drawn(self, images: Tensor, draws: Sequence[int]) -> Tensor:
        """Logarithms of the probabilities in each draw, (draws, B, num_classes)."""
        outputs = list[Tensor]()
        for draw in draws:
            self.set_draw(draw)
            outputs.append(self.model(images).float().log_softmax(dim=1))
        # Of a class that is -inf in all draws, logsumexp would have no gradient.
        return torch.stack(outputs).clamp_min(torch.finfo(torch.float32).min)


def _unclear(logarithms: Tensor) -> Tensor:
    """(B,) bool: whether chance may explain which class is the likeliest in (draws, B, classes)."""
    draws, probabilities = len(logarithms), logarithms.double().exp()
    first, second = probabilities.mean(dim=0).topk(2, dim=1).indices.T  # (B,) each
    rows = torch.arange(len(first), device=first.device)
    gaps = probabilities[:, rows, first] - probabilities[:, rows, second]  # (draws, B)
    errors = gaps.std(dim=0) / math.sqrt(draws)
    return gaps.mean(dim=0) < float(stdtrit(draws - 1, 1 - UNCLEAR)) * errors
