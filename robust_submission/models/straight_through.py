"""Backward pass differentiable approximation (BPDA, Athalye et al. 2018), with the identity."""

import torch
from torch import Tensor, nn


class StraightThrough(nn.Module):
    """A stage's values with the identity's gradient: what an attacker who knows of it uses.

    Args:
        stage: From images (B, 3, H, W), and whatever else it is called with, to images of the same
            shape.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, images: Tensor, *others: object) -> Tensor:
        with torch.no_grad():
            values = self.stage(images.detach(), *others)
        return values + (images - images.detach())  # value + exact zero
