"""Expectation over transformation: a random model seen as its own average (Athalye et al. 2018)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_submission.attacks.base import Model


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
            raise ValueError("Expected at least one draw. Received: none.")

    def __call__(self, images: Tensor) -> Tensor:
        outputs = list[Tensor]()
        for draw in self.draws:
            self.set_draw(draw)
            outputs.append(self.model(images).float().log_softmax(dim=1))
        return torch.stack(outputs).logsumexp(dim=0) - math.log(len(outputs))
