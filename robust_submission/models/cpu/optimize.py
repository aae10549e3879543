"""How a network is computed: the same weights and, within rounding, results, in less time on a CPU.

Linear layers and convolutions become the products that are fastest (`models.products`,
`models.small_convolutions`). GELU is oneDNN's, which is faster than torch's but takes tensors in
one order only. Channels-last weights make ResNet-50 and EfficientNet-B0 1.2 times as fast at 224
pixels on an AMD Zen 4 and cost ConvNeXt nothing. (docs/results/speed.md; `benchmarks/peak.py`
measures ConvNeXt.)
"""

from types import MethodType

import torch
from timm.layers.activations import GELU
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.models.cpu.products import product
from robust_submission.models.cpu.small_convolutions import multiply_convolutions

_NEW_SIZE = 8
"""oneDNN prepares each new size of batch, a millisecond or two a layer, which pays from this many
times the pixels on."""


def optimize_for_cpu(module: nn.Module, *, channels_last: bool, one_size: bool = True) -> None:
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

    Few pixels (or tokens) and layers of a type derived from nn.Linear are computed as before, and
    so is all that is compiled, and the gradient of the weights where that is slow. Weights, their
    names and the module's structure stay; results stay within rounding, which may then differ with
    the size of the batch and with whether a gradient is recorded.

    Args:
        module: Changed in place.
        one_size: As in `optimize_for_cpu`; where not, few are `_NEW_SIZE` times as many.
    """
    times = 1 if one_size else _NEW_SIZE

    def forward(layer: nn.Linear, features: Tensor) -> Tensor:
        return product(features, layer.weight, layer.bias, times=times)

    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = MethodType(forward, layer)


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
