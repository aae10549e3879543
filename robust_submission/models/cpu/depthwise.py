"""Depthwise convolutions that learn: the gradient of their weights, three columns at a time.

oneDNN has a kernel of its own for it on x86, for kernels up to three columns wide. With wider ones
it multiplies the gradient of each channel by sixteen channels, and takes about three times as long
as this does (docs/results/speed.md).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from robust_submission.models.cpu.products import is_arranged

_COLUMNS = 3
"""oneDNN's kernel takes no more."""
_ON_X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def learns_by_columns(images: Tensor, weight: Tensor) -> bool:
    """Whether `convolve_depthwise` is the faster way to give the same.

    Args:
        images: (B, C, H, W).
        weight: (C, 1, rows, columns), both odd, whose gradient is to follow.
    """
    (height, width), (rows, columns) = images.shape[2:], weight.shape[2:]
    within = rows <= height and _COLUMNS < columns <= width
    in_order = images.is_contiguous(memory_format=torch.channels_last)
    return _ON_X86 and within and in_order and is_arranged(images)


def convolve_depthwise(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d of each channel with a kernel of its own, so many zeros around that the size stays.

    Args:
        images: (B, C, H, W), channels-last.
        weight: (C, 1, rows, columns), both odd, at least five columns.
        bias: (C,).

    Returns:
        (B, C, H, W).
    """
    return _Depthwise.apply(images, weight, bias)


class _Depthwise(torch.autograd.Function):
    """As `models.products._Learning`, its backward pass computes the gradient of the weights
    whatever it is asked for: freeze them where the images' alone is wanted."""

    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, bias, padding=_around(weight), groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        (gradient,), (images, weight) = gradients, ctx.saved_tensors
        of_images, _, of_bias = ctx.needs_input_grad
        around, groups = _around(weight), len(weight)
        return (
            conv2d_input(images.shape, weight, gradient, padding=around, groups=groups)
            if of_images
            else None,
            _gradient_by_columns(images, weight, gradient),
            gradient.sum((0, 2, 3)) if of_bias else None,
        )


def _around(weight: Tensor) -> Any:  # torch.nn.grad annotates an int
    return weight.shape[2] // 2, weight.shape[3] // 2


def _gradient_by_columns(images: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """That of `weight`. Behind each row of pixels are as many zeros as a kernel reaches, so that
    images moved sideways are the same memory from another pixel on."""
    batch, channels, height, width = images.shape
    columns, (down, aside) = weight.shape[3], _around(weight)
    above: Any = (down, 0)
    wide = width + aside
    memory = images.new_zeros((batch * height * wide + 2 * aside) * channels)
    inside = memory.narrow(0, aside * channels, batch * height * wide * channels)
    inside.view(batch, height, wide, channels)[:, :, :width] = images.permute(0, 2, 3, 1)
    rows = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, aside + 1 - _COLUMNS))
    rows = rows.permute(0, 3, 1, 2)
    found = torch.empty_like(weight)
    for first in (*range(0, columns - _COLUMNS, _COLUMNS), columns - _COLUMNS):
        strides = (height * wide * channels, 1, wide * channels, channels)
        moved = memory.as_strided((batch, channels, height, wide), strides, first * channels)
        part = found[..., first : first + _COLUMNS]
        part.copy_(conv2d_weight(moved, part.shape, rows, padding=above, groups=channels))
    return found
