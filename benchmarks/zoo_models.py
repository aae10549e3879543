"""The models of the zoo by name: masked ones around one natural network, and honest ones.

Each row builds its model and its twins. A twin of a masked model is what an attacker who knows the
defence differentiates instead: the natural network, the defence with its gradient passed straight
through (BPDA), or the mean over draws (EOT).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import zoo_defences as defences
from robust_submission.attacks import Model
from robust_submission.models.classifier import RobustClassifier, reveal
from zoo_defences import Apply, Transform
from zoo_networks import BLUR, CODE, Networks

Build = Callable[[Networks], Model]
STAGES = (1, 2, 3, 4)
"""Parts of the network behind which `inside` puts a layer: the stem and the blocks."""


class StraightThrough(nn.Module):
    """`function` forward, its differentiable `stand_in` backward; the identity by default."""

    def __init__(self, function: Transform, stand_in: Transform = lambda inputs: inputs) -> None:
        super().__init__()
        self.function, self.stand_in = function, stand_in

    def forward(self, inputs: Tensor) -> Tensor:
        smooth = self.stand_in(inputs)
        return smooth + (self.function(inputs) - smooth).detach()


class Averaged(nn.Module):
    """The mean output over some calls of a random model."""

    def __init__(self, model: Model, draws: int = 8) -> None:
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.model(images) for _ in range(self.draws)]).mean(0)


class Logarithm(nn.Module):
    """Logarithm of a model's probabilities, as logits of its twin."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).clamp_min(1e-20).log()


class Smoothed(nn.Module):
    """Mean probabilities over seeded Gaussian noise (randomised smoothing as a classifier)."""

    noise: Tensor

    def __init__(self, network: nn.Module, draws: int = 16, sigma: float = 0.12) -> None:
        super().__init__()
        self.network = network
        generator = torch.Generator().manual_seed(0)
        noise = sigma * torch.randn(draws, 1, 3, 32, 32, generator=generator)
        self.register_buffer("noise", noise)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network((images + self.noise).flatten(0, 1))
        return logits.softmax(1).unflatten(0, (len(self.noise), -1)).mean(0)


class Ensemble(nn.Module):
    """The mean of several networks' logits."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images) for network in self.networks]).mean(0)


def network(name: str) -> Build:
    """A trained network as it is."""
    return lambda networks: networks(name)


def natural(networks: Networks) -> nn.Sequential:
    """The undefended network around which the masked models are built."""
    network = networks("natural")
    assert isinstance(network, nn.Sequential)
    return network


@dataclass(frozen=True)
class Row:
    """A model of the zoo, and what its true robustness is found on."""

    build: Build
    twins: tuple[Build, ...] = (natural,)


def at_output(function: Transform) -> Row:
    """A function of the logits."""
    return Row(lambda networks: nn.Sequential(natural(networks), Apply(function)))


def in_front(layer: Transform, networks: Networks) -> nn.Module:
    """A layer and the natural network behind it."""
    return nn.Sequential(layer if isinstance(layer, nn.Module) else Apply(layer), natural(networks))


def at_input(function: Transform) -> Row:
    """A function of the images that keeps their gradient from passing."""
    return Row(partial(in_front, function), (natural, partial(in_front, StraightThrough(function))))


def as_function(function: Transform) -> Row:
    """The same as a plain function, not a module."""

    def build(networks: Networks) -> Model:
        network = natural(networks)
        return lambda images: network(function(images))

    return Row(build, (natural, partial(in_front, StraightThrough(function))))


def inside(layer: Transform, networks: Networks) -> nn.Module:
    """The natural network with a layer behind its stem and behind each block."""
    network, layer = natural(networks), layer if isinstance(layer, nn.Module) else Apply(layer)
    parts = [
        [part, layer] if place in (1, 2, 3, 4) else [part] for place, part in enumerate(network)
    ]
    return nn.Sequential(*(part for each in parts for part in each))


def at_features(function: Transform) -> Row:
    """A function of the features that keeps their gradient from passing."""
    return Row(partial(inside, function), (natural, partial(inside, StraightThrough(function))))


def random(build: Build) -> Row:
    """A model that draws anew in each call."""
    return Row(build, (natural, lambda networks: Averaged(build(networks))))


def learned_quantiser(networks: Networks, *, straight: bool = False) -> nn.Module:
    """A quantiser behind the stem and each block, with the statistics of training images."""
    features, parts = networks.calibration_images(), list[nn.Module]()
    for place, part in enumerate(natural(networks)):
        features = part(features)
        parts.append(part)
        if place in STAGES:
            layer = defences.LearnedQuantiser(features)
            parts.append(StraightThrough(layer) if straight else layer)
    return nn.Sequential(*parts).requires_grad_(False)


def honest(build: Build, twin: Build | None = None) -> Row:
    """A model whose own gradient is right; a twin only where its outputs are probabilities."""
    return Row(build, (twin or build,))


def quantiser_twin(networks: Networks) -> nn.Module:
    """The same with the gradient passed straight through."""
    return learned_quantiser(networks, straight=True)


def thermometer(networks: Networks) -> nn.Module:
    """A network trained on thermometer codes."""
    return nn.Sequential(CODE, networks("thermometer"))


def thermometer_twin(networks: Networks) -> nn.Module:
    """The same, with a ramp over several levels in place of each step of the code."""

    def ramp(images: Tensor) -> Tensor:
        distance = images[:, :, None] - CODE.thresholds
        return (distance * 4 + 0.5).clamp(0, 1).flatten(1, 2)

    return nn.Sequential(StraightThrough(CODE, ramp), networks("thermometer"))


def winners_twin(networks: Networks) -> nn.Module:
    """k-WTA averaged over noise, which smooths its jumps (Tramer et al. 2020)."""
    network = networks("k-wta")
    return Averaged(lambda images: network(images + 0.02 * torch.randn_like(images)), draws=10)


def purified(networks: Networks) -> defences.Purified:
    """The natural network behind purification by itself."""
    return defences.Purified(natural(networks))


def purified_twin(networks: Networks) -> nn.Module:
    """The same with the gradient passed straight through the purification."""
    model = purified(networks)
    return nn.Sequential(StraightThrough(model.purify), model.network)


def tiny_gradients(
    place: Callable[[Transform, Networks], nn.Module], layer: Transform, networks: Networks
) -> nn.Module:
    """The natural network with a layer where tiny logits' gradients underflow."""
    return nn.Sequential(place(layer, networks), Apply(defences.tiny_logits))


def concealed(networks: Networks) -> RobustClassifier:
    """Our GCM in front of the natural network."""
    return RobustClassifier(
        class_names=[str(label) for label in range(10)],
        backbone=natural(networks),
        image_size=32,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def reversed_once(networks: Networks) -> nn.Module:
    """The natural network with the gradient reversed behind its second block."""
    network = natural(networks)
    return nn.Sequential(*network[:4], Apply(defences.ReversedBackward.apply), *network[4:])


def smoothed(networks: Networks) -> Smoothed:
    """Randomised smoothing of the network trained on noise."""
    return Smoothed(networks("noise"))


MASKED: dict[str, Row] = {
    "logits x 1000": at_output(defences.steep_logits),
    "softmax of logits x 10000": at_output(defences.steep_softmax),
    "saturated tanh": at_output(defences.saturated_tanh),
    "saturated sigmoid": at_output(defences.saturated_sigmoid),
    "rounded probabilities": at_output(defences.rounded_probabilities),
    "votes": Row(lambda networks: defences.Votes(natural(networks))),
    "float16 logits": at_output(defences.half_precision_logits),
    "4 bits by round": at_input(defences.four_bits),
    "4 bits by integers": at_input(defences.integer_division),
    "thermometer sum": at_input(defences.ThermometerSum()),
    "thermometer network": Row(thermometer, (thermometer_twin, natural)),
    "rounded features": at_features(defences.rounded_features),
    "learned quantiser": Row(learned_quantiser, (natural, quantiser_twin)),
    "k winners take all": Row(network("k-wta"), (winners_twin, natural)),
    "jpeg": as_function(defences.jpeg),
    "numpy bit depth": as_function(defences.numpy_bit_depth),
    "numpy median": at_input(defences.numpy_median),
    "detached plus zero": at_input(defences.detached_plus_zero),
    "detached features": at_features(defences.detached),
    "fast sine": at_input(defences.fast_sine),
    "sawtooth": as_function(defences.sawtooth),
    "reflected gradient": at_input(defences.reflected),
    "zero backward at input": at_input(defences.ZeroBackward.apply),
    "zero backward at features": at_features(defences.ZeroBackward.apply),
    "reversed backward at input": at_input(defences.ReversedBackward.apply),
    "reversed backward at features": Row(reversed_once),
    "tensor hook": at_input(defences.hooked),
    "underflow at input": Row(partial(tiny_gradients, in_front, defences.half_precision)),
    "underflow at features": Row(partial(tiny_gradients, inside, defences.huge_and_back)),
    "noise at input": random(partial(in_front, defences.noisy)),
    "noise at features": random(partial(inside, defences.noisy_features)),
    "resize and pad": random(partial(in_front, defences.resized_and_padded)),
    "purified": Row(purified, (natural, purified_twin)),
    "median filter": at_input(defences.median_filter),
    "total variation": at_input(defences.total_variation),
    "GCM": Row(concealed, (natural, lambda networks: reveal(concealed(networks)))),
}

AROUND_ANY = (
    *("logits x 1000", "softmax of logits x 10000", "4 bits by round", "fast sine", "jpeg"),
    *("noise at input", "natural"),
)
"""Rows that need no more of the natural network than its images and logits."""

HONEST: dict[str, Row] = {
    name: honest(network(name))
    for name in ("natural", "small", "fgsm", "pgd-4", "pgd-8", "trades", "label-smoothing")
} | {
    "blur": honest(lambda networks: nn.Sequential(BLUR, networks("blur"))),
    "ensemble": honest(lambda networks: Ensemble(networks("natural"), networks("second"))),
    "softmax": honest(lambda networks: nn.Sequential(natural(networks), nn.Softmax(1)), natural),
    "smoothing": honest(smoothed, lambda networks: Logarithm(smoothed(networks))),
}
