"""The losses that attacks maximise: one number per image, larger when the label fits worse."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits (B, num_classes), float32, and labels (B,) to losses (B,)."""

LARGEST_GAP = 12.0
"""Difference of the two largest logits up to which cross-entropy has an exact gradient."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; labels may also be probabilities (B, num_classes)."""
    return F.cross_entropy(logits, labels, reduction="none")


def bounded_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits that are divided until the largest two differ by at most 12.

    Further apart, the softmax is 0 and 1 in float32, and the gradient loses the label's logit or
    vanishes. Equal to cross-entropy where they are closer.
    """
    largest = logits.detach().topk(2, dim=1).values
    gaps = largest[:, :1] - largest[:, 1:]  # (B, 1)
    return cross_entropy(logits / (gaps / LARGEST_GAP).clamp_min(1), labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's: above 0 when fooled (Carlini & Wagner 2017)."""
    own = labels.unsqueeze(1)
    others = logits.scatter(1, own, -torch.inf)
    return others.amax(dim=1) - logits.gather(1, own).squeeze(1)


def logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, DLR (Croce & Hein 2020): a margin that has no scale.

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"DLR loss: expected at least 3 classes, found {logits.shape[1]}.")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "bounded-ce": bounded_cross_entropy,
    "margin": margin,
    "dlr": logits_ratio,
}
