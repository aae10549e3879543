"""TRN, the Two-stream Restoration Network: an image restored from the image and its gradient map.

Source: arXiv 2202.01117, which names two streams (the image and its gradient map), a Fusion Block
that fuses them, a mechanism that estimates the map without the label, and a restored image as the
output. Layers, losses and estimator are not available to us: this is a reading of the abstract.
Our choices, each with its reason:

- the streams work on patches of `stride` pixels: a quarter of the cost at stride 2, and the
  perturbation is seen in its neighbourhood; the way back is a pixel shuffle, without loss;
- residual convolutions without normalisation: a correction of a few 255ths must not depend on
  contrast or on the batch;
- a Fusion Block mixes both streams pixel by pixel and gates the result by a summary of the whole
  image, so that an image that was not attacked can be left alone;
- the output is a correction, zero at the start: an untrained TRN changes nothing.

TRN filters the perturbations of oblivious attackers. An adaptive attacker differentiates it as
well: see `classifier.reveal`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gradient_map import ESTIMATORS, Estimator, gradient_map
from .surrogate import Residual, Surrogate, patches

Classify = Callable[[Tensor], Tensor]


class FusionBlock(nn.Module):
    """Updates each stream from both, gated per channel for the whole image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.joint = nn.Conv2d(2 * width, width, 1)
        self.gate = nn.Linear(width, 2 * width)
        self.update = nn.Conv2d(width, 2 * width, 1)

    def forward(self, image: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams, (B, width, h, w) each."""
        joint = F.silu(self.joint(torch.cat([image, gradient], 1)))
        gate = self.gate(joint.mean((2, 3))).sigmoid()[:, :, None, None]
        to_image, to_gradient = (gate * self.update(joint)).chunk(2, 1)
        return image + to_image, gradient + to_gradient


class TRN(nn.Module):
    """From images, and the classifier that it protects, to restored images.

    Args:
        channels: Of the images, 1 or 3.
        width: Channels of a stream.
        depth: Pairs of residual blocks, each followed by a Fusion Block.
        stride: Side in pixels of the patches that a stream works on.
        streams: "both", or "image" or "gradient" alone.
        fusion: "fusion" for Fusion Blocks; "concatenation" keeps the streams apart to the end.
        estimator: The gradient map's, see `gradient_map.logit_weights`.
        top_k: Classes of the estimator "average"; None for all.
        surrogate: Arguments of `Surrogate`, which then gives the map; None for the classifier.

    Attributes:
        arguments: What it was made with, as JSON can hold it.

    Raises:
        ValueError: an unknown choice or a number out of range.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        width: int = 48,
        depth: int = 4,
        stride: int = 2,
        streams: Literal["both", "image", "gradient"] = "both",
        fusion: Literal["fusion", "concatenation"] = "fusion",
        estimator: Estimator = "predicted",
        top_k: int | None = None,
        surrogate: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_choice("streams", streams, ("both", "image", "gradient"))
        _check_choice("fusion", fusion, ("fusion", "concatenation"))
        _check_choice("estimator", estimator, ESTIMATORS)
        if min(width, depth, stride) < 1 or channels not in (1, 3) or (top_k or 1) < 1:
            raise ValueError(
                "TRN: expected 1 or 3 channels and width, depth, stride, top_k of at least 1, "
                f"received {channels}, {width}, {depth}, {stride}, {top_k}."
            )
        self.arguments: dict[str, Any] = {
            "channels": channels,
            "width": width,
            "depth": depth,
            "stride": stride,
            "streams": streams,
            "fusion": fusion,
            "estimator": estimator,
            "top_k": top_k,
            "surrogate": surrogate,
        }
        self.channels, self.depth, self.stride = channels, depth, stride
        self.estimator: Estimator = estimator
        self.top_k = top_k
        names = ("image", "gradient") if streams == "both" else (streams,)
        self.stems = nn.ModuleDict({name: patches(channels, width, stride) for name in names})
        self.blocks = nn.ModuleDict(
            {name: nn.ModuleList(Residual(width) for _ in range(depth)) for name in names}
        )
        fuses = streams == "both" and fusion == "fusion"
        self.fusions = nn.ModuleList(FusionBlock(width) for _ in range(depth if fuses else 0))
        self.head = nn.Conv2d(len(names) * width, channels * stride**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # pyright: ignore[reportArgumentType]
        self.surrogate = None
        if surrogate is not None and streams != "image":
            self.surrogate = Surrogate(channels=channels, **surrogate)

    def extra_repr(self) -> str:
        return f"estimator={self.estimator}"

    def summary(self) -> str:
        """One line for reports."""
        source = "the classifier" if self.surrogate is None else "its surrogate"
        streams = " and ".join(self.stems)
        return f"TRN(streams: {streams}; gradient map: {self.estimator}, from {source})"

    def forward(self, images: Tensor, classify: Classify) -> Tensor:
        """Restored images; autograd treats the gradient map as a constant.

        Args:
            images: (B, C, H, W), floating point, 0 to 1, of any size.
            classify: From images to logits, without gradient masking and in eval mode; not called
                if a surrogate gives the map or no stream needs it.

        Returns:
            (B, C, H, W), 0 to 1.
        """
        return self.restore(images, self.gradient_map(images, classify))

    def gradient_map(
        self, images: Tensor, classify: Classify, *, differentiable: bool = False
    ) -> Tensor | None:
        """The map (B, C, H, W) for `restore`; None without a gradient stream."""
        if "gradient" not in self.stems:
            return None
        if self.surrogate is None:
            return gradient_map(
                images, classify, self.estimator, self.top_k, differentiable=differentiable
            )
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            return self.surrogate.gradient_map(images, self.estimator, self.top_k)[0]

    def restore(self, images: Tensor, gradients: Tensor | None) -> Tensor:
        """Restored images (B, C, H, W), 0 to 1, of images and their gradient maps."""
        height, width = images.shape[2:]
        inputs = {"image": images, "gradient": gradients}
        padding = (0, -width % self.stride, 0, -height % self.stride)
        streams = {
            name: stem(F.pad(inputs[name], padding, mode="replicate"))
            for name, stem in self.stems.items()
        }  # (B, width, H / stride, W / stride) each
        for place in range(self.depth):
            blocks = {name: each[place] for name, each in self.blocks.items()}  # pyright: ignore[reportIndexIssue]
            streams = {name: blocks[name](each) for name, each in streams.items()}
            if self.fusions:
                image, gradient = self.fusions[place](streams["image"], streams["gradient"])
                streams = {"image": image, "gradient": gradient}
        correction = F.pixel_shuffle(self.head(torch.cat(list(streams.values()), 1)), self.stride)
        return (images + correction[:, :, :height, :width]).clamp(0, 1)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"TRN: expected {name} of {', '.join(known)}, received {value!r}.")


class DifferentiableTRN(nn.Module):
    """The same restored images, differentiable through the gradient map too (second order)."""

    def __init__(self, trn: TRN) -> None:
        super().__init__()
        self.trn = trn

    def forward(self, images: Tensor, classify: Classify) -> Tensor:
        gradients = self.trn.gradient_map(images, classify, differentiable=True)
        return self.trn.restore(images, gradients)
