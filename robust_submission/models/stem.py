"""A convolutional stem for ConvNeXt in place of its patches, which learns robustness better.

Singh, Croce & Hein 2023, Revisiting Adversarial Training for ImageNet (arXiv 2303.01870).
"""

from math import prod

from timm.layers import Mlp
from timm.layers.mlp import GlobalResponseNormMlp
from timm.models.convnext import ConvNeXt
from torch import nn

from robust_submission.cli.errors import UserError

_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}
"""Of the two convolutions, by how much the stem shrinks the image."""


def put_conv_stem(network: nn.Module) -> None:
    """Replace a ConvNeXt's stem by 3x3 to half the width, norm, activation, 3x3 to all of it, norm.

    It shrinks the image as much as the patches did.

    Norm, activation, and whether there are biases, are the network's own; the weights are drawn as
    timm draws those of a ConvNeXt.

    Args:
        network: Changed in place.

    Raises:
        UserError: it is no ConvNeXt of timm, or its stem does not shrink the image by 1, 2 or 4.
    """
    if not isinstance(network, ConvNeXt):
        raise UserError(f"stem: expected patch, or a ConvNeXt, found {type(network).__name__}.")
    assert isinstance(network.stem, nn.Sequential)
    convolutions = [layer for layer in network.stem if isinstance(layer, nn.Conv2d)]
    stride, norm = prod(each.stride[0] for each in convolutions), network.stem[-1]
    if stride not in _STRIDES:
        raise UserError(f"stem: expected patch, or a patch_size of 1, 2 or 4, found {stride}.")
    channels, bias = convolutions[-1].out_channels, convolutions[0].bias is not None
    half, eps = channels // 2, vars(norm)["eps"]
    first, second = _STRIDES[stride]
    network.stem = nn.Sequential(
        nn.Conv2d(convolutions[0].in_channels, half, 3, first, padding=1, bias=bias),
        type(norm)(half, eps=eps),
        _activation_of(network),
        nn.Conv2d(half, channels, 3, second, padding=1, bias=bias),
        type(norm)(channels, eps=eps),
    )
    for layer in network.stem:
        if isinstance(layer, nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _activation_of(network: ConvNeXt) -> nn.Module:
    """A layer with the activation of the network's blocks."""
    kinds = (Mlp, GlobalResponseNormMlp)
    found = [type(part.act) for part in network.stages.modules() if isinstance(part, kinds)]
    return found[0]() if found else nn.GELU()
