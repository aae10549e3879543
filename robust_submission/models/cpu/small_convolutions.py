"""Convolutions that are one product, of the weights and the images' pixels or patches, on a CPU.

oneDNN is slow with small images: it convolves image by image where a product takes all their pixels
as rows, and has no kernel for some gradients at all (docs/results/speed.md).
"""

import math
from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.models.cpu.depthwise import convolve_depthwise, learns_by_columns
from robust_submission.models.cpu.products import gradient_follows, product

_ONEDNN_BLOCK = 16
"""Channels that oneDNN takes at once, at most. A kernel of one pixel that strides over fewer must
not be its: the gradient of the weights is wrong then, and the heap corrupted (its issue 6035)."""
_MOST_PATCHES = 16
"""An image of no more patches is multiplied by the weights."""
_MOST_PATCHES_WITH_GRADIENT = 256
"""The same where a gradient follows: with that of patches oneDNN is slower still."""
_MOST_PAIRS = 256
"""Pairs of a pixel and a place of the kernel that are multiplied one by one: all of 4x4 and 4x4."""


def multiply_convolutions(module: nn.Module) -> None:
    """Have convolutions in `module` be computed as products on a CPU, where that is all they are.

    With kernels of one pixel, every pixel is a row of one product; with kernels side by side (the
    stems and downsampling of ConvNeXt and ViT), every patch, in images of few. And where a kernel
    has one place, all around the image, every image is: oneDNN takes 50 ms to convolve 128 images
    of one pixel with a 7x7 kernel for each of 768 channels, the product 0.1. Where such kernels,
    one a channel and larger than the image, have few places and learn, sums of products take a
    tenth of oneDNN's time or less; where the image is larger, see `models.depthwise`. Other
    convolutions are computed as before. Weights, their names and the module's structure stay,
    results within rounding, which may then differ with whether a gradient is recorded.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _plain(layer):
            layer.forward = MethodType(_multiplied, layer)


def _plain(layer: nn.Conv2d) -> bool:
    """Kernels of all channels or of one each, not dilated, around the image so many zeros."""
    one_each = layer.groups == layer.in_channels == layer.out_channels
    zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return zeros and layer.dilation == (1, 1) and (layer.groups == 1 or one_each)


def _multiplied(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """(B, in, H, W) to (B, out, H', W'), as nn.Conv2d does, which takes whatever is no product."""
    if images.ndim != 4 or images.device.type != "cpu":
        return nn.Conv2d.forward(layer, images)
    if _takes_pixels(layer) and images.is_contiguous(memory_format=torch.channels_last):
        down, right = layer.stride
        met = images if down == right == 1 else images[:, :, ::down, ::right]  # a view costs 10 us
        pixels, weight = met.permute(0, 2, 3, 1), layer.weight.flatten(1)
        return product(pixels, weight, layer.bias).permute(0, 3, 1, 2)
    if _takes_patches(layer, images):
        patches, weight = _patches(images, layer), layer.weight.permute(0, 2, 3, 1).flatten(1)
        return product(patches, weight, layer.bias).permute(0, 3, 1, 2)
    if _takes_pairs(layer, images):
        return _sum_of_pairs(layer, images)
    if _learns_apart(layer) and _keeps_size(layer) and learns_by_columns(images, layer.weight):
        return convolve_depthwise(images, layer.weight, layer.bias)
    if (part := _part_met(layer, images)) is None:
        return nn.Conv2d.forward(layer, images)
    if layer.groups == 1:
        rows, weight = (each.permute(0, 2, 3, 1).flatten(1) for each in (images, part))
        return product(rows, weight, layer.bias)[:, :, None, None]
    products = (images * part[:, 0]).sum((2, 3), keepdim=True)
    return products if layer.bias is None else products + layer.bias[:, None, None]


def _takes_pixels(layer: nn.Conv2d) -> bool:
    one_by_one = {*layer.kernel_size, layer.groups} == {1} and set(layer.padding) == {0}
    return one_by_one and (set(layer.stride) == {1} or layer.in_channels < _ONEDNN_BLOCK)


def _takes_patches(layer: nn.Conv2d, images: Tensor) -> bool:
    """Few patches, side by side; channels-last, as the product is."""
    beside = layer.kernel_size == layer.stride != (1, 1) and set(layer.padding) == {0}
    (rows, columns), (height, width) = layer.kernel_size, images.shape[2:]
    if not beside or layer.groups > 1 or height % rows or width % columns:
        return False
    gradient = gradient_follows(images) or gradient_follows(layer.weight)
    most = _MOST_PATCHES_WITH_GRADIENT if gradient else _MOST_PATCHES
    few = (height // rows) * (width // columns) <= most
    return few and layer.weight.is_contiguous(memory_format=torch.channels_last)


def _patches(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """(B, C, H, W) to (B, H / rows, W / columns, rows * columns * C)."""
    batch, channels, height, width = images.shape
    rows, columns = layer.kernel_size
    strips = (batch, height // rows, rows, width // columns, columns * channels)
    return torch.cat(images.permute(0, 2, 3, 1).reshape(strips).unbind(2), dim=-1)


def _axes(layer: nn.Conv2d, images: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Of rows, then of columns: pixels in an image and in the kernel, zeros around, stride."""
    sides = zip(images.shape[2:], layer.kernel_size, layer.padding, layer.stride, strict=True)
    for size, side, padding, step in sides:
        assert isinstance(padding, int)  # not "same": `_plain`
        yield size, side, padding, step


def _part_met(layer: nn.Conv2d, images: Tensor) -> Tensor | None:
    """Of a kernel that has one place, around all of the image, what meets it: (out, in, H, W)."""
    part = layer.weight
    for axis, (size, side, padding, step) in enumerate(_axes(layer, images), start=2):
        if not 0 <= size + 2 * padding - side < step or padding + size > side:
            return None
        part = part.narrow(axis, padding, size)
    return part


def _takes_pairs(layer: nn.Conv2d, images: Tensor) -> bool:
    """A kernel for each channel that learns and is larger than the image; few pixels and places."""
    if not _learns_apart(layer):
        return False
    axes = list(_axes(layer, images))
    places = [size + 2 * padding - side + 1 for size, side, padding, _ in axes]
    larger = any(side > size for size, side, _, _ in axes)
    pairs = math.prod(places) * math.prod(images.shape[2:])
    return larger and min(places) > 0 and pairs <= _MOST_PAIRS


def _learns_apart(layer: nn.Conv2d) -> bool:
    """A kernel for each channel that learns and moves by a pixel."""
    return layer.groups > 1 and layer.stride == (1, 1) and gradient_follows(layer.weight)


def _keeps_size(layer: nn.Conv2d) -> bool:
    """As many zeros around an image as keep its size."""
    sides = zip(layer.padding, layer.kernel_size, strict=True)
    return all(2 * int(zeros) + 1 == side for zeros, side in sides)


def _sum_of_pairs(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, H', W'): all pixels, weighted as each place of the kernel does."""
    down, right = (size + padding - side for size, side, padding, _ in _axes(layer, images))
    kernels = F.pad(layer.weight[:, 0], (right, right, down, down))
    height, width = images.shape[2:]
    places = kernels.unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)  # (C, H', W', H, W)
    weights = places.permute(1, 2, 3, 4, 0).flatten(2, 3).contiguous()  # (H', W', H * W, C)
    pixels = images.permute(0, 2, 3, 1).flatten(1, 2)[:, None, None]  # (B, 1, 1, H * W, C)
    sums = (pixels * weights).sum(3)
    return (sums if layer.bias is None else sums + layer.bias).permute(0, 3, 1, 2)
