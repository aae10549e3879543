"""Linear layers computed as 1x1 convolutions, which a CPU does faster.

ConvNeXt and its like multiply (B, H, W, C) by the weights of a linear layer. torch hands that
product to MKL, and the same product as a 1x1 convolution to oneDNN, which was 1.1 times as fast
with it on an AMD EPYC. (`python benchmarks/peak.py` measures both.)
"""

from types import MethodType

from torch import Tensor, nn
from torch.nn import functional as F


def convolve_linear_layers(module: nn.Module) -> None:
    """Have every linear layer in `module` treat images on a CPU by a 1x1 convolution.

    Weights, their names and the module's structure stay; results stay within rounding, which may
    then differ with the size of the batch. oneDNN prepares each new size of batch for milliseconds
    a layer: for batches of one size. Other inputs, and layers of a type derived from nn.Linear, are
    computed as before.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = MethodType(_forward, layer)


def _forward(layer: nn.Linear, features: Tensor) -> Tensor:
    """(..., in) to (..., out); by a convolution for (B, H, W, in) on a CPU."""
    if features.ndim != 4 or features.device.type != "cpu":
        return F.linear(features, layer.weight, layer.bias)
    images = features.permute(0, 3, 1, 2)  # (B, in, H, W)
    return F.conv2d(images, layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1)
