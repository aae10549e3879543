"""Several attacks as one (worst case per image), and a random model as its average (EOT)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_submission.attacks.base import (
    Attack,
    Model,
    check_batch,
    correct,
    differentiable,
    ordinary,
)
from robust_submission.attacks.losses import cross_entropy
from robust_submission.cli.errors import UserError


@dataclass(frozen=True)
class WorstCaseResult:
    """What the worst case did to each image."""

    images: Tensor
    """(B, 3, H, W): the example that fooled, else the tried one of the largest cross-entropy."""

    fooled_by: list[str]
    """The attack that fooled, "clean" where the image was wrong from the start, "" where none."""

    losses: Tensor
    """(B,): the cross-entropies of `images`."""

    @property
    def robust(self) -> Tensor:
        """(B,) bool: which images withstood everything."""
        return torch.tensor([not name for name in self.fooled_by], dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """The worst of several untargeted attacks, image by image; itself an attack.

    An image that the model gets wrong is left as it is. Attacks see fewer and fewer images: give
    seeds, so that the draws for an image do not depend on which others are left.
    """

    attacks: Mapping[str, Attack]
    """Names and attacks, the cheap ones best first."""

    def __post_init__(self) -> None:
        if not self.attacks:
            raise UserError("Expected at least one attack. Received: none.")
        if any(getattr(attack, "targeted", False) for attack in self.attacks.values()):
            raise UserError("Expected untargeted attacks only. Received: a targeted one.")

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
        """Attack a batch and say what fooled which image.

        `scored_on` is the model to be fooled, where the attacks differentiate another, as in an
        adaptive or a transfer attack. The other arguments are those of `Attack`.
        """
        check_batch(images, labels)
        scored_on = scored_on or model
        with differentiable(), torch.no_grad():
            images, labels = ordinary(images), ordinary(labels)
            worst = images.clone()
            worst_loss, right = _score(scored_on, images, labels)
            fooled_by = ["" if survives else "clean" for survives in right.tolist()]
            for name, attack in self.attacks.items():
                rows = right.nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                some = None if seeds is None else seeds[rows.to(seeds.device)]
                tried = attack(model, images[rows], labels[rows], generator, seeds=some)
                loss, survives = _score(scored_on, tried, labels[rows])
                worse = ~survives | (loss > worst_loss[rows])
                worst[rows[worse]], worst_loss[rows[worse]] = tried[worse], loss[worse]
                right[rows] = survives
                for row in rows[~survives].tolist():
                    fooled_by[row] = name
        return WorstCaseResult(worst, fooled_by, worst_loss)


def _score(model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies (B,), and whether the label won (B,)."""
    logits = model(images).float()
    return cross_entropy(logits, labels), correct(logits, labels)


@dataclass(frozen=True)
class EOT:
    """A model that averages the probabilities of several draws of a random model.

        attack(EOT(model, range(20), set_draw), images, labels)

    Returns the logarithm of the average probabilities, (B, num_classes): cross-entropy then is
    -log of the average probability of the label, and the gradient is that of the expectation.
    Averages of logits would let one confident draw outvote many. Holds the graphs of all draws at
    once: memory grows with their number. Leaves the model at its last draw.
    """

    model: Model
    """The random model: images (B, 3, H, W) to logits."""

    draws: Sequence[int]
    """The draws to average over, such as `range(20)`; judge on others than you attack."""

    set_draw: Callable[[int], object]
    """Makes the model use its k-th draw until told otherwise: `set_draw(k)`."""

    def __post_init__(self) -> None:
        if not len(self.draws):
            raise UserError("Expected at least one draw. Received: none.")

    def __call__(self, images: Tensor) -> Tensor:
        outputs = list[Tensor]()
        for draw in self.draws:
            self.set_draw(draw)
            outputs.append(self.model(images).float().log_softmax(dim=1))
        return torch.stack(outputs).logsumexp(dim=0) - math.log(len(outputs))
