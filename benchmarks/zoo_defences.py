"""Defences as strangers write them: each a few lines of torch that stop or spoil gradients.

Functions map images or features to the same shape, or logits to outputs; `Apply` makes a layer of
one. Nothing here is robust, and nothing here knows of robust_submission.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

Transform = Callable[[Tensor], Tensor]


class Apply(nn.Module):
    """A function of one tensor as a layer."""

    def __init__(self, function: Transform) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs)


# Outputs that saturate or are rounded


def steep_logits(logits: Tensor) -> Tensor:
    return 1000 * logits


def steep_softmax(logits: Tensor) -> Tensor:
    return (10_000 * logits).softmax(1)


def saturated_tanh(logits: Tensor) -> Tensor:
    return torch.tanh(100 * (logits - logits.amax(1, keepdim=True)))


def saturated_sigmoid(logits: Tensor) -> Tensor:
    middle = logits.topk(2, dim=1).values.mean(1, keepdim=True)
    return torch.sigmoid(200 * (logits - middle))


def rounded_probabilities(logits: Tensor) -> Tensor:
    return (10 * logits.softmax(1)).round() / 10


def half_precision_logits(logits: Tensor) -> Tensor:
    return (100 * logits).half() * 1e-8


class Votes(nn.Module):
    """The share of five seeded noisy copies that vote for each class."""

    def __init__(self, network: nn.Module, copies: int = 5, sigma: float = 0.03) -> None:
        super().__init__()
        self.network, self.copies, self.sigma = network, copies, sigma

    def forward(self, images: Tensor) -> Tensor:
        generator = torch.Generator(images.device).manual_seed(0)
        votes = []
        for _ in range(self.copies):
            noise = torch.randn(images.shape[1:], generator=generator, device=images.device)
            winners = self.network(images + self.sigma * noise).argmax(1)
            votes.append(F.one_hot(winners, 10).float())
        return torch.stack(votes).mean(0)


# Images and features on a grid


def four_bits(images: Tensor) -> Tensor:
    return (images * 15).round() / 15


def integer_division(images: Tensor) -> Tensor:
    return ((images * 255 + 0.5).to(torch.uint8) // 16).float() / 15


def numpy_bit_depth(images: Tensor) -> Tensor:
    pixels = np.rint(images.detach().cpu().numpy() * 15) / 15
    return torch.from_numpy(pixels).to(images)


def numpy_median(images: Tensor) -> Tensor:
    pixels = np.pad(images.detach().cpu().numpy(), [(0, 0), (0, 0), (0, 1), (0, 1)], mode="edge")
    corners = [pixels[..., :-1, :-1], pixels[..., 1:, :-1], pixels[..., :-1, 1:]]
    return torch.from_numpy(np.median(np.stack(corners), axis=0)).to(images)


def jpeg(images: Tensor, quality: int = 75) -> Tensor:
    decoded = []
    for image in (images.detach() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images) / 255


class Thermometer(nn.Module):
    """Each value becomes `levels` ones and zeros: (B, 3, H, W) to (B, 3 levels, H, W)."""

    thresholds: Tensor

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels
        thresholds = (torch.arange(levels) + 0.5) / levels
        self.register_buffer("thresholds", thresholds.view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images[:, :, None] > self.thresholds).float().flatten(1, 2)


class ThermometerSum(nn.Module):
    """A thermometer code that a fixed 1x1 convolution sums up to three channels again."""

    def __init__(self, levels: int = 15) -> None:
        super().__init__()
        self.code = Thermometer(levels)
        self.sum = nn.Conv2d(3 * levels, 3, 1, groups=3, bias=False)
        nn.init.constant_(self.sum.weight, 1 / levels)

    def forward(self, images: Tensor) -> Tensor:
        return self.sum(self.code(images))


def rounded_features(features: Tensor) -> Tensor:
    return (features * 4).round() / 4


class LearnedQuantiser(nn.Module):
    """Values near their channel's mean become the mean, as in MeanSparse; others a level beside it.

    Mean and step, `width` standard deviations, are those of some features (N, C, H, W).
    """

    def __init__(self, features: Tensor, width: float = 0.75) -> None:
        super().__init__()
        self.mean = nn.Parameter(features.mean((0, 2, 3), keepdim=True))
        self.step = nn.Parameter(width * features.std((0, 2, 3), keepdim=True))

    def forward(self, features: Tensor) -> Tensor:
        levels = ((features - self.mean) / self.step).round()
        return self.mean + levels * self.step


class WinnersTakeAll(nn.Module):
    """k-WTA: only the largest `share` of an image's activations stay (Xiao et al. 2020)."""

    def __init__(self, share: float = 0.2) -> None:
        super().__init__()
        self.share = share

    def forward(self, features: Tensor) -> Tensor:
        flat = features.flatten(1)
        least = flat.topk(int(self.share * flat.shape[1]), sorted=False).values.amin(1)
        return features * (features >= least.view(-1, 1, 1, 1))


# Gradients that are cut, spoiled, reversed or too small


def detached_plus_zero(images: Tensor) -> Tensor:
    return images.detach() + 0 * images


def detached(features: Tensor) -> Tensor:
    return features.detach()


def fast_sine(images: Tensor) -> Tensor:
    return images + 1e-6 * torch.sin(1e18 * images)


def sawtooth(images: Tensor) -> Tensor:
    return images + 1e-5 * ((images * 1e6) % 2 - 1).abs()


def reflected(images: Tensor) -> Tensor:
    return 2 * images.detach() - images


class ZeroBackward(Function):
    """The identity with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


class ReversedBackward(ZeroBackward):
    """The identity with a gradient of the wrong sign."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def hooked(images: Tensor) -> Tensor:
    images = images.clone()
    if images.requires_grad:
        images.register_hook(lambda gradient: gradient.flip(2, 3))
    return images


# Gradients from logits this small are zero in float16, and in float32 when divided by 1e30.


def tiny_logits(logits: Tensor) -> Tensor:
    return logits * 1e-20


def half_precision(images: Tensor) -> Tensor:
    return images.half().float()


def huge_and_back(features: Tensor) -> Tensor:
    return features * 1e30 * 1e-30


# Randomness, without a seed


def noisy(images: Tensor) -> Tensor:
    return images + 0.06 * torch.randn_like(images)


def noisy_features(features: Tensor) -> Tensor:
    return features + 0.5 * features.std() * torch.randn_like(features)


def resized_and_padded(images: Tensor) -> Tensor:
    side = images.shape[-1]
    small = int(torch.randint(side - 4, side + 1, ()))
    left, top = torch.randint(side - small + 1, (2,)).tolist()
    resized = F.interpolate(images, (small, small), mode="bilinear", antialias=True)
    return F.pad(resized, (left, side - small - left, top, side - small - top))


# Filters and purifying loops


def median_filter(images: Tensor) -> Tensor:
    """3x3, weighted towards the middle, which counts three times."""
    batch, channels, height, width = images.shape
    windows = F.unfold(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3)
    windows = windows.view(batch, channels, 9, height, width)
    middle = windows[:, :, 4:5].expand(-1, -1, 2, -1, -1)
    return torch.cat([windows, middle], 2).sort(2).values[:, :, 5]


def _total_variation(images: Tensor) -> Tensor:
    return images.diff(dim=2).abs().sum() + images.diff(dim=3).abs().sum()


def total_variation(images: Tensor, weight: float = 0.05, steps: int = 10) -> Tensor:
    """Gradient descent on half the squared distance plus `weight` times the total variation."""
    noisy = images.detach()
    clean = noisy.clone()
    for _ in range(steps):
        with torch.enable_grad():
            point = clean.requires_grad_()
            energy = (point - noisy).square().sum() / 2 + weight * _total_variation(point)
            (gradient,) = torch.autograd.grad(energy, point)
        clean = (point - 0.2 * gradient).detach()
    return clean.clamp(0, 1)


class Purified(nn.Module):
    """Moves each image to where the network is surer of it, then classifies that."""

    def __init__(self, network: nn.Module, steps: int = 5, step_size: float = 1 / 255) -> None:
        super().__init__()
        self.network, self.steps, self.step_size = network, steps, step_size

    def purify(self, images: Tensor) -> Tensor:
        points = images.detach()
        for _ in range(self.steps):
            with torch.enable_grad():
                points.requires_grad_()
                logits = self.network(points)
                entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum()
                (gradient,) = torch.autograd.grad(entropy, points)
            points = (points - self.step_size * gradient.sign()).detach().clamp(0, 1)
        return points

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.purify(images))
