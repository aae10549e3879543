"""GCM, the training-free Gradient Concealment Module.

Source: "Gradient Concealment: Free Lunch for Defending Adversarial Attacks", arXiv 2205.10617,
`GCM(x) = x + epsilon * sin(omega * x)`.

GCM is gradient masking. It keeps every prediction and multiplies each pixel's gradient by
`1 + epsilon * omega * cos(omega * x)`, a factor of up to 1e12 whose sign looks random. An oblivious
attacker follows random directions. An adaptive one divides by the factor, or passes the gradient
straight through (BPDA, Athalye et al. 2018), and the defence is gone: see `classifier.reveal`.
Where a pixel is exactly 0 the factor is 1e12: on black the gradient keeps its sign.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conceal(images: Tensor, omega: float = 1e20, epsilon: float = 1e-8) -> Tensor:
    """Move each pixel by at most `epsilon` along a sine too fast to differentiate usefully.

    Computed in float32 with autocast off: in float16 `omega` overflows to infinity and the result
    would be NaN; in bfloat16 a step of 1e-8 vanishes, and with it the effect.

    Args:
        images: Raw images of any floating type, shape (B, C, H, W), RGB, 0 to 1.
        omega: Angular frequency per unit of pixel value.
        epsilon: Largest shift, in units of pixel value.

    Returns:
        float32 images of the same shape. For float16 input the gradient, which may exceed what
        float16 can hold, is clamped to its finite range; its sign is kept.
    """
    with torch.autocast(images.device.type, enabled=False):
        if images.dtype == torch.float16 and images.requires_grad:
            images = _FiniteGradient.apply(images)
        images = images.float()
        return images + epsilon * torch.sin(omega * images)


class _FiniteGradient(torch.autograd.Function):
    """float16 to float32, with the gradient on the way back clamped to what float16 can hold."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, images: Tensor) -> Tensor:
        return images.float()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> Tensor:
        limit = torch.finfo(torch.float16).max
        return grad_outputs[0].clamp(-limit, limit).half()


class GCM(nn.Module):
    """`conceal` as the first layer of a model: without parameters, the same in train and eval mode.

    Args:
        omega: Angular frequency, 1e20 in the paper.
        epsilon: Largest shift of a pixel, 1e-8 in the paper.

    Raises:
        ValueError: `omega` or `epsilon` is not positive.
    """

    def __init__(self, omega: float = 1e20, epsilon: float = 1e-8) -> None:
        super().__init__()
        if omega <= 0 or epsilon <= 0:
            raise ValueError(f"GCM: expected omega, epsilon > 0, received {omega}, {epsilon}.")
        self.omega = omega
        self.epsilon = epsilon

    def forward(self, images: Tensor) -> Tensor:
        return conceal(images, self.omega, self.epsilon)

    def extra_repr(self) -> str:
        return f"omega={self.omega:g}, epsilon={self.epsilon:g}"
