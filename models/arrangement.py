"""How a network is computed: the same weights and, within rounding, results, in less time on a CPU.

On x86, torch leaves products of float32 matrices, those of linear layers, to MKL, which uses half
of AMD's newer processors, and convolutions to oneDNN. So here products are 1x1 convolutions, but
for small ones: oneDNN sorts the weights anew in each call. And convolutions that are one product,
of the weights and the images' pixels or patches, are computed as that: oneDNN is slow with small
images. GELU it computes faster than torch does, but of tensors in one order only. Channels-last
weights make ResNet-50 and EfficientNet-B0 1.2 times as fast at 224 pixels on an AMD Zen 4 and cost
ConvNeXt nothing. (docs/results/speed.md; `benchmarks/peak.py` measures ConvNeXt.)
"""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType

import torch
from timm.layers.activations import GELU
from torch import Tensor, nn
from torch.nn import functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Without AVX-512, oneDNN takes three times as long as MKL for the gradient of a product's weights
(measured on an AMD EPYC of Zen 3)."""
_NEW_SIZE = 8
"""oneDNN prepares each new size of batch, a millisecond or two a layer, which pays with so many
times the pixels."""
_FEWEST_VALUES = 20_480
"""With no more in an image, torch itself leaves oneDNN out (use_mkldnn in its Convolution.cpp)."""
_ONEDNN_BLOCK = 16
"""Channels that oneDNN takes at once, at most. A kernel of one pixel that strides over fewer must
not be its: the gradient of the weights is wrong then, and the heap corrupted (its issue 6035)."""
_MOST_PATCHES = 16
"""An image of no more patches is multiplied by the weights."""
_MOST_PATCHES_WITH_GRADIENT = 256
"""The same where a gradient follows: with that of patches oneDNN is slower still."""
_MOST_PAIRS = 256
"""Of a pixel and a place of the kernel, to be multiplied one by one: of 4x4 and 4x4, all."""


def fewest_pixels(description: Path = Path("/proc/cpuinfo")) -> int:
    """How many rows a product needs for oneDNN to be faster than MKL on this processor.

    MKL has vectors of 256 bits on AMD's processors: all of Zen 3 and before, about what Zen 4 can
    do in a cycle, and half of what Zen 5 (family 26) can. Where it has all, as on Intel's, it only
    falls behind with many rows.

    Args:
        description: Linux's, of which the first core is read. Others have none.
    """
    found = dict[str, str]()
    if description.exists():
        with description.open() as lines:
            for line in itertools.takewhile(str.strip, lines):
                name, _, value = line.partition(":")
                found[name.strip()] = value.strip()
    match found.get("vendor_id"):
        case "GenuineIntel":
            return 8192
        case "AuthenticAMD" if _AVX2_ALONE:
            return 4096
        case "AuthenticAMD" if int(found.get("cpu family", 0)) >= 26:
            return 64
        case _:
            return 512


FEWEST_PIXELS = fewest_pixels()
"""Products of fewer rows are left to MKL."""


def arrange(module: nn.Module, *, channels_last: bool, one_size: bool = True) -> None:
    """Have `module` compute the way that is fastest on a CPU; on a GPU it does as before.

    Args:
        module: Changed in place.
        channels_last: Lay its weights out channels-last: as a CPU, not a GPU, prefers.
        one_size: All its batches have the same size; those of attacks shrink.
    """
    convolve_linear_layers(module, one_size=one_size)
    multiply_convolutions(module)
    activate_channels_last(module)
    if channels_last:
        keep_channels_last(module)


def keep_channels_last(module: nn.Module) -> None:
    """Lay the four-dimensional weights of `module` out channels-last; features then follow.

    Weights, their names and the module's structure stay. What shards them (FSDP) or takes a flat
    view of them finds them not contiguous.
    """
    for weight in module.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def convolve_linear_layers(module: nn.Module, *, one_size: bool = True) -> None:
    """Have every linear layer in `module` compute by a 1x1 convolution on a CPU.

    Few pixels (or tokens), weights that learn without AVX-512, and layers of a type derived from
    nn.Linear are computed as before, and so is all that is compiled. Weights, their names and the
    module's structure stay; results stay within rounding, which may then differ with the size of
    the batch and with whether a gradient is recorded.

    Args:
        module: Changed in place.
        one_size: As in `arrange`. Where sizes vary, fewer than `_NEW_SIZE` times as many pixels are
            few.
    """
    fewest = FEWEST_PIXELS * (1 if one_size else _NEW_SIZE)
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = MethodType(_linear(fewest), layer)


def _linear(fewest: int) -> Callable[[nn.Linear, Tensor], Tensor]:
    def forward(layer: nn.Linear, features: Tensor) -> Tensor:
        return _product(features, layer.weight, layer.bias, fewest)

    return forward


def _product(features: Tensor, weight: Tensor, bias: Tensor | None, fewest: int) -> Tensor:
    """F.linear: (..., in) and (out, in) to (..., out), of `fewest` pixels or more by oneDNN."""
    pixels = features.shape[:-1].numel()
    few = pixels < fewest or features.numel() <= _FEWEST_VALUES
    slow = _AVX2_ALONE and _gradient_follows(weight)
    by_onednn = features.device.type == "cpu" and _HAS_ONEDNN
    # In half precision F.linear is oneDNN's, and faster; a compiler would copy what it convolves.
    single = features.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if few or slow or not by_onednn or not single or torch.compiler.is_compiling():
        return F.linear(features, weight, bias)
    image = features.reshape(1, pixels, 1, features.shape[-1]).permute(0, 3, 1, 2)
    # Dilating one pixel changes nothing; a kernel not dilated torch leaves to MKL on one thread.
    convolved = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return convolved.permute(0, 2, 3, 1).reshape(*features.shape[:-1], -1)


def _gradient_follows(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def multiply_convolutions(module: nn.Module) -> None:
    """Have convolutions in `module` be computed as products on a CPU, where they are no more.

    With kernels of one pixel, every pixel is a row of one product; with kernels side by side (the
    stems and downsampling of ConvNeXt and ViT), every patch, in images of few. And where a kernel
    has one place, all around the image, every image is: oneDNN takes 50 ms to convolve 128 images
    of one pixel with a 7x7 kernel for each of 768 channels, the product 0.1. Where such kernels,
    one a channel and larger than the image, have few places and learn, sums of products take a
    tenth of oneDNN's time or less. Other convolutions are computed as before. Weights, their names
    and the module's structure stay, results within rounding, which may then differ with whether a
    gradient is recorded.
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
        (down, right), weight = layer.stride, layer.weight.flatten(1)
        pixels = images[:, :, ::down, ::right].permute(0, 2, 3, 1)
        return _product(pixels, weight, layer.bias, FEWEST_PIXELS).permute(0, 3, 1, 2)
    if _takes_patches(layer, images):
        patches, weight = _patches(images, layer), layer.weight.permute(0, 2, 3, 1).flatten(1)
        return _product(patches, weight, layer.bias, FEWEST_PIXELS).permute(0, 3, 1, 2)
    if _takes_pairs(layer, images):
        return _sum_of_pairs(layer, images)
    if (part := _part_met(layer, images)) is None:
        return nn.Conv2d.forward(layer, images)
    if layer.groups == 1:
        rows, weight = (each.permute(0, 2, 3, 1).flatten(1) for each in (images, part))
        return _product(rows, weight, layer.bias, FEWEST_PIXELS)[:, :, None, None]
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
    gradient = _gradient_follows(images) or _gradient_follows(layer.weight)
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
    if layer.groups == 1 or layer.stride != (1, 1) or not _gradient_follows(layer.weight):
        return False
    axes = list(_axes(layer, images))
    places = [size + 2 * padding - side + 1 for size, side, padding, _ in axes]
    larger = any(side > size for size, side, _, _ in axes)
    pairs = math.prod(places) * math.prod(images.shape[2:])
    return larger and min(places) > 0 and pairs <= _MOST_PAIRS


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


def activate_channels_last(module: nn.Module) -> None:
    """Have every GELU in `module` take channels-last images as rows of pixels, within rounding.

    torch leaves it to oneDNN in standard order alone (use_mkldnn in its Activation.cpp).
    """
    for layer in module.modules():
        if type(layer) in (nn.GELU, GELU):
            layer.forward = MethodType(_activated, layer)


def _activated(layer: nn.GELU | GELU, features: Tensor) -> Tensor:
    approximate = layer.approximate if isinstance(layer, nn.GELU) else "none"
    if features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last):
        rows = F.gelu(features.permute(0, 2, 3, 1), approximate=approximate)
        return rows.permute(0, 3, 1, 2)
    return F.gelu(features, approximate=approximate)
