"""A small classifier that gives gradient maps in closed form, in place of a large one.

The gradient map of ConvNeXt-Tiny at 224 pixels costs a second forward pass and a backward pass, 9 G
operations more where the challenge allows 5 G in all. A surrogate of a few convolutions, distilled
from the classifier, gives a map for 0.13 G. Its backward pass is written out: ordinary operations,
which work without autograd, under inference mode, in ONNX and torch.export, and can be
differentiated like any others. (ptflops does not count transposed convolutions: half of them.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gradient_map import Estimator, logit_weights, normalized


def silu_slope(inputs: Tensor) -> Tensor:
    """The derivative of SiLU."""
    gate = inputs.sigmoid()
    return gate * (1 + inputs * (1 - gate))


def patches(in_channels: int, out_channels: int, side: int) -> nn.Conv2d:
    """A convolution of patches side by side; an edge that fills no patch is left out."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=side, stride=side)


def pull_back_patches(layer: nn.Conv2d, gradient: Tensor, inputs: Tensor) -> Tensor:
    """The gradient with respect to the inputs of `patches`, given that of the outputs."""
    side = layer.stride[0]
    unseen = (inputs.shape[2] % side, inputs.shape[3] % side)
    return F.conv_transpose2d(gradient, layer.weight, stride=side, output_padding=unseen)


class Residual(nn.Module):
    """`x + outer(silu(inner(x)))`, of two 3 x 3 convolutions; the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.outer.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.finish(inputs, self.inner(inputs))

    def finish(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        return inputs + self.outer(F.silu(hidden))

    def pull_back(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """The gradient with respect to the inputs, given that of the outputs."""
        inner = F.conv_transpose2d(gradient, self.outer.weight, padding=1) * silu_slope(hidden)
        return gradient + F.conv_transpose2d(inner, self.inner.weight, padding=1)


class Surrogate(nn.Module):
    """Images to logits and to gradient maps.

    Args:
        num_classes: Logits.
        channels: Of the images, 1 or 3.
        widths: Channels of each stage; each stage after the first halves the resolution.
        depth: Residual blocks per stage.
        stride: Side in pixels of the first stage's patches.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        widths: Sequence[int] = (32, 64),
        depth: int = 2,
        stride: int = 2,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            before, side = (widths[stage - 1], 2) if stage else (channels, stride)
            layers += [patches(before, width, side), *(Residual(width) for _ in range(depth))]
        self.layers = nn.ModuleList(layers)
        self.arguments = {
            "num_classes": num_classes,
            "widths": list(widths),
            "depth": depth,
            "stride": stride,
        }
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W), floating point, 0 to 1."""
        features = images - 0.5
        for layer in self.layers:
            features = layer(features)
        return self.head(F.silu(features).mean((2, 3)))

    def gradient_map(
        self, images: Tensor, estimator: Estimator, top_k: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradient map of each image and the logits; see `gradient_map.gradient_map`.

        Returns:
            float32 (B, C, H, W), and (B, num_classes).
        """
        with torch.autocast(images.device.type, enabled=False):
            pixels = images.to(torch.promote_types(images.dtype, torch.float32))
            features, seen = pixels - 0.5, list[Tensor]()
            for layer in self.layers:
                if isinstance(layer, Residual):
                    seen.append(layer.inner(features))
                    features = layer.finish(features, seen[-1])
                else:
                    seen.append(features)
                    features = layer(features)
            logits = self.head(F.silu(features).mean((2, 3)))
            weights = logit_weights(logits, estimator, top_k)
            gradient = silu_slope(features) * (weights @ self.head.weight)[:, :, None, None]
            for place in reversed(range(len(seen))):
                layer = self.layers[place]
                if isinstance(layer, Residual):
                    gradient = layer.pull_back(gradient, seen[place])
                else:
                    assert isinstance(layer, nn.Conv2d)
                    gradient = pull_back_patches(layer, gradient, seen[place])
            return normalized(gradient), logits
