"""The losses that attacks maximise: one number per image, larger when the label fits worse."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits (B, num_classes), float32, and labels (B,) to losses (B,)."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; labels may also be probabilities (B, num_classes)."""
    return F.cross_entropy(logits, labels, reduction="none")


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


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": logits_ratio}
