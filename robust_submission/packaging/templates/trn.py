"""TRN for model.py: images restored from themselves and their gradient maps, in plain torch.

`restore(images, gradients)` is the network; `gradient_map(images, classify)` its second input. An
attack that knows of TRN differentiates both: see `differentiable`. Written for Python 3.6 and torch
1.5, and whatever came after.
"""

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def silu_slope(x: Tensor) -> Tensor:
    gate = x.sigmoid()
    return gate * (1 + x * (1 - gate))


def logit_weights(logits: Tensor, estimator: str, top_k: int) -> Tensor:
    """The gradient of a label-free loss with respect to the logits, up to a factor."""
    exact = logits.double()
    if estimator == "predicted":
        label = torch.zeros_like(exact).scatter(1, exact.argmax(1, keepdim=True), 1.0)
        return (exact.masked_fill(label > 0, -float("inf")).softmax(1) - label).to(logits.dtype)
    if estimator == "expected":
        log_probabilities = exact.log_softmax(1)
        probabilities = log_probabilities.exp()
        entropy = -(probabilities * log_probabilities).sum(1, keepdim=True)
        weights = -probabilities * (log_probabilities + entropy)
        return (weights / weights.abs().max(1, keepdim=True)[0].clamp(min=1e-300)).to(logits.dtype)
    likely = torch.zeros_like(exact).scatter(1, exact.topk(top_k, dim=1)[1], 1 / top_k)
    return (exact.softmax(1) - likely).to(logits.dtype)


def normalized(gradient: Tensor) -> Tensor:
    """Each image's gradient at a root mean square of 1."""
    largest = gradient.abs().flatten(1).max(1)[0][:, None, None, None]
    gradient = gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny)
    return gradient * gradient.pow(2).mean((1, 2, 3), keepdim=True).clamp(min=1e-12).rsqrt()


def patches(in_channels: int, out_channels: int, side: int) -> nn.Conv2d:
    """A convolution of patches side by side."""
    return nn.Conv2d(in_channels, out_channels, side, stride=side)


def pull_back_patches(layer: nn.Conv2d, gradient: Tensor, inputs: Tensor) -> Tensor:
    side = layer.stride[0]
    unseen = (inputs.shape[2] % side, inputs.shape[3] % side)
    return F.conv_transpose2d(gradient, layer.weight, stride=side, output_padding=unseen)


class Residual(nn.Module):
    """x + outer(silu(inner(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, self.inner(x))

    def finish(self, x: Tensor, hidden: Tensor) -> Tensor:
        return x + self.outer(silu(hidden))

    def pull_back(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        inner = F.conv_transpose2d(gradient, self.outer.weight, padding=1) * silu_slope(hidden)
        return gradient + F.conv_transpose2d(inner, self.inner.weight, padding=1)


class Surrogate(nn.Module):
    """A small classifier with its backward pass written out."""

    def __init__(self, widths: list, depth: int, stride: int, num_classes: int) -> None:
        super().__init__()
        layers = []
        for stage, width in enumerate(widths):
            before, side = (widths[stage - 1], 2) if stage else (3, stride)
            layers.append(patches(before, width, side))
            layers.extend(Residual(width) for _ in range(depth))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def gradient_map(self, images: Tensor, estimator: str, top_k: int) -> Tensor:
        features, seen = images - 0.5, []
        for layer in self.layers:
            if isinstance(layer, Residual):
                seen.append(layer.inner(features))
                features = layer.finish(features, seen[-1])
            else:
                seen.append(features)
                features = layer(features)
        weights = logit_weights(self.head(silu(features).mean((2, 3))), estimator, top_k)
        gradient = silu_slope(features) * (weights @ self.head.weight)[:, :, None, None]
        for place in reversed(range(len(seen))):
            layer = self.layers[place]
            if isinstance(layer, Residual):
                gradient = layer.pull_back(gradient, seen[place])
            else:
                gradient = pull_back_patches(layer, gradient, seen[place])  # type: ignore
        return normalized(gradient)


class FusionBlock(nn.Module):
    """Adds to each stream what both together say, gated for the whole image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.joint = nn.Conv2d(2 * width, width, 1)
        self.gate = nn.Linear(width, 2 * width)
        self.update = nn.Conv2d(width, 2 * width, 1)

    def forward(self, image: Tensor, gradient: Tensor) -> tuple:
        joint = silu(self.joint(torch.cat([image, gradient], 1)))
        gate = self.gate(joint.mean((2, 3))).sigmoid()[:, :, None, None]
        to_image, to_gradient = (gate * self.update(joint)).chunk(2, 1)
        return image + to_image, gradient + to_gradient


class TRN(nn.Module):
    """RGB images (N, 3, H, W) to restored ones."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.stride, width = config["stride"], config["width"]
        self.estimator, self.top_k = config["estimator"], config["top_k"]
        self.differentiable = False
        names, depth = config["streams"], config["depth"]
        self.names, self.depth = names, depth  # torch 1.5 sorts the keys of a ModuleDict
        self.stems = nn.ModuleDict({name: patches(3, width, self.stride) for name in names})
        self.blocks = nn.ModuleDict(
            {name: nn.ModuleList([Residual(width) for _ in range(depth)]) for name in names}
        )
        self.fusions = nn.ModuleList([FusionBlock(width) for _ in range(config["fusions"])])
        self.head = nn.Conv2d(len(names) * width, 3 * self.stride**2, 3, padding=1)
        self.surrogate = Surrogate(**config["surrogate"]) if config["surrogate"] else None

    def forward(self, images: Tensor, classify) -> Tensor:
        return self.restore(images, self.gradient_map(images, classify))

    def gradient_map(self, images: Tensor, classify) -> Tensor:
        """The map (N, 3, H, W); a constant for autograd unless `differentiable`."""
        keep_graph = self.differentiable and torch.is_grad_enabled()
        if "gradient" not in self.stems:
            return images
        if self.surrogate is not None:
            with torch.set_grad_enabled(keep_graph):
                return self.surrogate.gradient_map(images, self.estimator, self.top_k)
        with ExitStack() as stack:
            if hasattr(torch, "inference_mode"):
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            pixels = images
            if not (keep_graph and images.requires_grad):
                pixels = images.detach().clone().requires_grad_()
            logits = classify(pixels)
            seen = logits if keep_graph else logits.detach()
            weights = logit_weights(seen, self.estimator, self.top_k)
            return normalized(
                torch.autograd.grad(logits, pixels, weights, create_graph=keep_graph)[0]
            )

    def restore(self, images: Tensor, gradients: Tensor) -> Tensor:
        height, width = images.shape[2:]
        padding = (0, -width % self.stride, 0, -height % self.stride)
        inputs = {"image": images, "gradient": gradients}
        streams = {
            name: self.stems[name](F.pad(inputs[name], padding, mode="replicate"))
            for name in self.names
        }
        for place in range(self.depth):
            blocks = {name: each[place] for name, each in self.blocks.items()}  # type: ignore
            streams = {name: blocks[name](each) for name, each in streams.items()}
            if len(self.fusions):
                fused = self.fusions[place](streams["image"], streams["gradient"])
                streams = {"image": fused[0], "gradient": fused[1]}
        together = torch.cat([streams[name] for name in self.names], 1)
        correction = F.pixel_shuffle(self.head(together), self.stride)
        return (images + correction[:, :, :height, :width]).clamp(0, 1)
