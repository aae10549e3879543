"""Convolutions that oneDNN computes slowly on a CPU: small images, few patches, some gradients.

It convolves image by image where one product has the pixels of all images as its rows. For the
gradient of depthwise weights it has a kernel up to three columns wide. For wider ones it multiplies
the gradient of each channel by sixteen channels, and for kernels larger than the image it has none.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from robust_submission.models.cpu.products import is_float32_on_cpu, needs_gradient, product

_ONEDNN_BLOCK = 16
"""Most channels in a block of oneDNN. A strided 1x1 kernel over fewer must not be oneDNN's: the
gradient of its weights is wrong, and the heap corrupted (oneDNN issue 6035)."""
_MOST_PATCHES = 16
"""An image of at most so many patches is multiplied by the weights."""
_MOST_PATCHES_WITH_GRADIENT = 256
"""The same where a gradient is needed: oneDNN's gradient of patches is slower still."""
_MOST_PAIRS = 256
"""Pairs of a pixel and a place of the kernel that are multiplied one by one: all of 4x4 and 4x4."""


_COLUMNS = 3
"""Most columns of oneDNN's kernel for the gradient of depthwise weights."""
_ON_X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class ProductConv2d(nn.Conv2d):
    """nn.Conv2d, within rounding, as a product where that is faster.

    - 1x1 kernels: each pixel is a row of one product.
    - Kernels side by side (the stems and downsampling of ConvNeXt and ViT): each patch is, in
      images of few patches.
    - A kernel that fits in one place only, around the whole image: each image is.
    - Depthwise kernels whose weights need a gradient: see `sum_of_pairs`, `convolve_by_columns`.

    Everything else is torch's. Results may differ, within rounding, with whether a gradient is
    recorded.
    """

    @staticmethod
    def suits(layer: nn.Conv2d) -> bool:
        """Zero-padded, not dilated, and dense or with one kernel per channel."""
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return zeros and layer.dilation == (1, 1) and (layer.groups == 1 or depthwise)

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H', W')."""
        if input.ndim != 4 or input.device.type != "cpu":
            return super().forward(input)
        if self.multiplies_pixels(input):
            down, right = self.stride
            seen = input if down == right == 1 else input[:, :, ::down, ::right]  # a view: 10 us
            pixels, weight = seen.permute(0, 2, 3, 1), self.weight.flatten(1)
            return product(pixels, weight, self.bias).permute(0, 3, 1, 2)
        if self.multiplies_patches(input):
            patches, weight = self._patches(input), self.weight.permute(0, 2, 3, 1).flatten(1)
            return product(patches, weight, self.bias).permute(0, 3, 1, 2)
        if self.multiplies_pairs(input):
            return sum_of_pairs(input, self.weight, self.bias, self._zeros())
        if self.gains_by_columns(input):
            return convolve_by_columns(input, self.weight, self.bias)
        if (part := self.part_over(input)) is None:
            return super().forward(input)
        if self.groups == 1:
            rows, weight = (each.permute(0, 2, 3, 1).flatten(1) for each in (input, part))
            return product(rows, weight, self.bias)[:, :, None, None]
        products = (input * part[:, 0]).sum((2, 3), keepdim=True)
        return products if self.bias is None else products + self.bias[:, None, None]

    def _zeros(self) -> tuple[int, int]:
        """Zeros above and below, left and right."""
        down, right = self.padding
        assert isinstance(down, int) and isinstance(right, int)  # not "same": `suits`
        return down, right

    def _axes(self, images: Tensor) -> Iterator[tuple[int, int, int, int]]:
        """For rows, then columns: pixels in an image and in the kernel, padding, stride."""
        sizes = images.shape[2:]
        return zip(sizes, self.kernel_size, self._zeros(), self.stride, strict=True)

    def multiplies_pixels(self, images: Tensor) -> bool:
        """1x1 kernels on channels-last images."""
        one_by_one = {*self.kernel_size, self.groups} == {1} and set(self.padding) == {0}
        either = set(self.stride) == {1} or self.in_channels < _ONEDNN_BLOCK
        in_order = images.is_contiguous(memory_format=torch.channels_last)
        return one_by_one and either and in_order

    def multiplies_patches(self, images: Tensor) -> bool:
        """Few patches, side by side; channels-last, as the product is."""
        beside = self.kernel_size == self.stride != (1, 1) and set(self.padding) == {0}
        (rows, columns), (height, width) = self.kernel_size, images.shape[2:]
        if not beside or self.groups > 1 or height % rows or width % columns:
            return False
        gradient = needs_gradient(images) or needs_gradient(self.weight)
        most = _MOST_PATCHES_WITH_GRADIENT if gradient else _MOST_PATCHES
        few = (height // rows) * (width // columns) <= most
        return few and self.weight.is_contiguous(memory_format=torch.channels_last)

    def _patches(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H / rows, W / columns, rows * columns * C)."""
        batch, channels, height, width = images.shape
        rows, columns = self.kernel_size
        strips = (batch, height // rows, rows, width // columns, columns * channels)
        return torch.cat(images.permute(0, 2, 3, 1).reshape(strips).unbind(2), dim=-1)

    def part_over(self, images: Tensor) -> Tensor | None:
        """The part of the kernel that lies over the image, (out, in, H, W), if there is only one
        place for the kernel, and it reaches beyond the image on all sides."""
        part = self.weight
        for axis, (size, side, padding, step) in enumerate(self._axes(images), start=2):
            if not 0 <= size + 2 * padding - side < step or padding + size > side:
                return None
            part = part.narrow(axis, padding, size)
        return part

    def multiplies_pairs(self, images: Tensor) -> bool:
        """Depthwise with a gradient, a kernel larger than the image; few pixels and places."""
        if not self._is_trained_depthwise():
            return False
        axes = list(self._axes(images))
        places = [size + 2 * padding - side + 1 for size, side, padding, _ in axes]
        larger = any(side > size for size, side, _, _ in axes)
        pairs = math.prod(places) * math.prod(images.shape[2:])
        return larger and min(places) > 0 and pairs <= _MOST_PAIRS

    def gains_by_columns(self, images: Tensor) -> bool:
        """Depthwise with a gradient, a wide kernel within the image, padded to keep its size."""
        sides = zip(self._zeros(), self.kernel_size, strict=True)
        keeps_size = all(2 * zeros + 1 == side for zeros, side in sides)
        if not (_ON_X86 and keeps_size and self._is_trained_depthwise()):
            return False
        (height, width), (rows, columns) = images.shape[2:], self.kernel_size
        within = rows <= height and _COLUMNS < columns <= width
        in_order = images.is_contiguous(memory_format=torch.channels_last)
        return within and in_order and is_float32_on_cpu(images)

    def _is_trained_depthwise(self) -> bool:
        return self.groups > 1 and self.stride == (1, 1) and needs_gradient(self.weight)

    def _get_name(self) -> str:
        return nn.Conv2d.__name__


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
