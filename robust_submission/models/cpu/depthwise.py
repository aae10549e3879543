"""Depthwise convolutions whose weights need a gradient, which oneDNN computes slowly.

Up to three columns wide, oneDNN has a kernel for that gradient. For wider ones it multiplies the
gradient of each channel by sixteen channels, and for kernels larger than the image it has none.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

_COLUMNS = 3
"""oneDNN's kernel takes no more."""
_ON_X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def gains_by_columns(images: Tensor, weight: Tensor) -> bool:
    """Whether `convolve_by_columns` is faster than torch.

    Args:
        images: (B, C, H, W), float32 on a CPU.
        weight: (C, 1, rows, columns), both odd, which needs a gradient.
    """
    (height, width), (rows, columns) = images.shape[2:], weight.shape[2:]
    within = rows <= height and _COLUMNS < columns <= width
    return _ON_X86 and within and images.is_contiguous(memory_format=torch.channels_last)


def convolve_by_columns(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d of each channel with its kernel, padded so that the size stays.

    The gradient of the weights is computed three columns at a time.

    Args:
        images: (B, C, H, W), channels-last.
        weight: (C, 1, rows, columns), both odd, at least five columns.
        bias: (C,).

    Returns:
        (B, C, H, W).
    """
    return _ByColumns.apply(images, weight, bias)


class _ByColumns(torch.autograd.Function):
    """Its backward pass computes the gradient of the weights even where that of the images alone is
    wanted: freeze the weights there (`surgery.frozen`)."""

    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, bias, padding=_padding(weight), groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        (gradient,), (images, weight) = gradients, ctx.saved_tensors
        of_images, _, of_bias = ctx.needs_input_grad
        padding, groups = _padding(weight), len(weight)
        return (
            conv2d_input(images.shape, weight, gradient, padding=padding, groups=groups)
            if of_images
            else None,
            _weight_gradient(images, weight, gradient),
            gradient.sum((0, 2, 3)) if of_bias else None,
        )


def _padding(weight: Tensor) -> Any:  # torch.nn.grad annotates an int
    return weight.shape[2] // 2, weight.shape[3] // 2


def _weight_gradient(images: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a kernel's three columns is that of a kernel of three columns on images
    shifted sideways. Each row of pixels is followed by as many zeros as the kernel reaches, so that
    shifted images are views of the same memory."""
    batch, channels, height, width = images.shape
    columns, (down, aside) = weight.shape[3], _padding(weight)
    padding: Any = (down, 0)
    wide = width + aside
    memory = images.new_zeros((batch * height * wide + 2 * aside) * channels)
    inside = memory.narrow(0, aside * channels, batch * height * wide * channels)
    inside.view(batch, height, wide, channels)[:, :, :width] = images.permute(0, 2, 3, 1)
    rows = F.pad(gradient.permute(0, 2, 3, 1), (0, 0, 0, aside + 1 - _COLUMNS))
    rows = rows.permute(0, 3, 1, 2)
    found = torch.empty_like(weight)
    for first in (*range(0, columns - _COLUMNS, _COLUMNS), columns - _COLUMNS):
        strides = (height * wide * channels, 1, wide * channels, channels)
        shifted = memory.as_strided((batch, channels, height, wide), strides, first * channels)
        part = found[..., first : first + _COLUMNS]
        part.copy_(conv2d_weight(shifted, part.shape, rows, padding=padding, groups=channels))
    return found


def sum_of_pairs(
    images: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
) -> Tensor:
    """F.conv2d of each channel with its kernel, as a sum over pairs of a pixel and a place.

    For small images: all pixels are weighted for each place of the kernel.

    Args:
        images: (B, C, H, W).
        weight: (C, 1, rows, columns).
        bias: (C,).
        padding: Zeros above and below, left and right.

    Returns:
        (B, C, H', W').
    """
    height, width = images.shape[2:]
    down, right = (
        size + zeros - side
        for size, zeros, side in zip((height, width), padding, weight.shape[2:], strict=True)
    )
    kernels = F.pad(weight[:, 0], (right, right, down, down))
    places = kernels.unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)  # (C, H', W', H, W)
    weights = places.permute(1, 2, 3, 4, 0).flatten(2, 3).contiguous()  # (H', W', H * W, C)
    pixels = images.permute(0, 2, 3, 1).flatten(1, 2)[:, None, None]  # (B, 1, 1, H * W, C)
    sums = (pixels * weights).sum(3)
    return (sums if bias is None else sums + bias).permute(0, 3, 1, 2)
