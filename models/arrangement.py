"""How a network is computed: the same weights and, within rounding, results, in less time on a CPU.

Channels-last weights make ResNet-50 and EfficientNet-B0 1.2 times as fast at 224 pixels on an AMD
EPYC and cost ConvNeXt nothing. ConvNeXt and its like multiply (B, H, W, C) by the weights of a
linear layer: torch hands that product to MKL, and the same product as a 1x1 convolution to oneDNN,
which was 1.1 times as fast with it. oneDNN is slow with images of one pixel, which ConvNeXt's last
stage has of 32 pixels. (docs/results/speed.md; `python benchmarks/peak.py` measures ConvNeXt.)
"""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEWEST_PIXELS = 512
"""oneDNN sorts the weights anew in each call, which fewer pixels don't pay."""


def arrange(module: nn.Module, device: torch.device, *, one_size: bool = True) -> None:
    """Have `module` compute the way that is fastest on `device`.

    Args:
        module: Changed in place.
        device: Where it computes, or will.
        one_size: All its batches have the same size; those of attacks shrink.
    """
    if one_size:
        convolve_linear_layers(module)
    multiply_single_pixels(module)
    if device.type == "cpu":
        keep_channels_last(module)


def keep_channels_last(module: nn.Module) -> None:
    """Lay the four-dimensional weights of `module` out channels-last; features then follow.

    Weights, their names and the module's structure stay. What shards them (FSDP) or takes a flat
    view of them finds them not contiguous.
    """
    for weight in module.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def convolve_linear_layers(module: nn.Module) -> None:
    """Have every linear layer in `module` treat images on a CPU by a 1x1 convolution.

    Batches of fewer than `FEWEST_PIXELS` pixels, other inputs, and layers of a type derived from
    nn.Linear are computed as before. Weights, their names and the module's structure stay; results
    stay within rounding, which may then differ with the size of the batch. oneDNN prepares each new
    size of batch for milliseconds a layer: for batches of one size.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = MethodType(_forward, layer)


def _forward(layer: nn.Linear, features: Tensor) -> Tensor:
    """(..., in) to (..., out); by a convolution for (B, H, W, in) on a CPU."""
    pixels = features.shape[:-1].numel()
    if features.ndim != 4 or features.device.type != "cpu" or pixels < FEWEST_PIXELS:
        return F.linear(features, layer.weight, layer.bias)
    batch, height, width, channels = features.shape
    image = features.reshape(1, batch * height, width, channels).permute(0, 3, 1, 2)
    convolved = F.conv2d(image, layer.weight[:, :, None, None], layer.bias)
    return convolved.permute(0, 2, 3, 1).reshape(batch, height, width, -1)


def multiply_single_pixels(module: nn.Module) -> None:
    """Have convolutions in `module` multiply images of one pixel on a CPU by their kernels' centre.

    The rest of a kernel meets nothing but padding. 128 such images of 768 channels take oneDNN
    50 ms with a 7x7 kernel a channel, this product 0.1; 1x1 kernels take it twice the time of a
    linear layer. Applies to convolutions that keep the size of an image and have one group or one
    for each channel. Weights, their names and the module's structure stay, results within rounding.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _keeps_size(layer):
            layer.forward = MethodType(_multiplied, layer)


def _keeps_size(layer: nn.Conv2d) -> bool:
    around = tuple(
        dilation * (side - 1) / 2
        for side, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
    )
    one_each = layer.groups == layer.in_channels == layer.out_channels
    plain = layer.padding_mode == "zeros" and set(layer.stride) == {1}
    return plain and layer.padding == around and (layer.groups == 1 or one_each)


def _multiplied(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """(B, in, H, W) to (B, out, H, W)."""
    if images.shape[2:] != (1, 1) or images.device.type != "cpu":
        return nn.Conv2d.forward(layer, images)
    height, width = layer.kernel_size
    centre = layer.weight[:, :, height // 2, width // 2]
    if layer.groups == 1:
        return F.linear(images[:, :, 0, 0], centre, layer.bias)[:, :, None, None]
    products = images * centre[:, :, None]
    return products if layer.bias is None else products + layer.bias[:, None, None]
