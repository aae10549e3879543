"""Layers computed in other ways: the same numbers, weights and structure."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from models.arrangement import (
    FEWEST_PIXELS,
    arrange,
    convolve_linear_layers,
    multiply_single_pixels,
)

FEATURES = torch.randn(2, 16, 18, 6, generator=torch.Generator().manual_seed(0))


class Doubled(nn.Linear):
    """A layer of a type of its own."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(features)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [FEATURES, FEATURES[0], FEATURES[0, 0], FEATURES[:0]])
def test_a_layer_gives_what_it_gave(features: torch.Tensor, bias: bool):
    layer = nn.Linear(6, 4, bias=bias)
    expected = F.linear(features, layer.weight, layer.bias)
    convolve_linear_layers(layer)
    torch.testing.assert_close(layer(features), expected)


def test_images_are_convolved_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    calls = list[tuple[int, ...]]()
    convolve = F.conv2d

    def counted(images: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(images.shape))
        return convolve(images, *arguments)

    monkeypatch.setattr(F, "conv2d", counted)
    model = nn.ModuleList([nn.Linear(6, 4), Doubled(6, 4)])
    convolve_linear_layers(model)
    for layer in model:
        layer(FEATURES)
        layer(FEATURES[0])
        layer(FEATURES[:1])  # too few pixels
    assert calls == [(1, 6, 2 * 16, 18)] and FEWEST_PIXELS > 16 * 18


def test_a_network_keeps_its_logits_gradients_and_names():
    torch.manual_seed(0)
    plain = timm.create_model("test_convnext", num_classes=3, conv_mlp=False)
    arranged = copy.deepcopy(plain)
    arrange(arranged, torch.device("cpu"))
    assert repr(arranged) == repr(plain)
    stem = arranged.get_parameter("stem.0.weight")
    assert stem.is_contiguous(memory_format=torch.channels_last) and not stem.is_contiguous()
    images = torch.rand(9, 3, 32, 32)  # 576 pixels in the first stage
    for model in (plain, arranged):
        model(images).square().sum().backward()
    torch.testing.assert_close(arranged(images), plain(images))
    own, other = (dict(model.named_parameters()) for model in (arranged, plain))
    assert own.keys() == other.keys()
    for name, weight in own.items():
        torch.testing.assert_close(weight.grad, other[name].grad, rtol=1e-3, atol=1e-5)


def test_a_copy_computes_with_its_own_weights():
    layer = nn.Linear(6, 4)
    convolve_linear_layers(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
        assert other.bias is not None
        other.bias.zero_()
    assert layer(FEATURES).any() and not other(FEATURES).any()


CONVOLUTIONS = {
    "1x1": nn.Conv2d(6, 4, 1),
    "3x3": nn.Conv2d(6, 4, 3, padding=1, bias=False),
    "depthwise": nn.Conv2d(6, 6, 7, padding=3, groups=6),
    "depthwise, no bias": nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6, bias=False),
    "dilated": nn.Conv2d(6, 4, 3, padding=2, dilation=2),
    "groups": nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "two a channel": nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "larger": nn.Conv2d(6, 4, 3, padding=2),
    "even": nn.Conv2d(6, 4, 2, padding=1),
    "strided": nn.Conv2d(6, 4, 3, padding=1, stride=2),
    "same": nn.Conv2d(6, 4, 3, padding="same"),
    "circular": nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("shape", [(3, 6, 1, 1), (3, 6, 5, 1), (0, 6, 1, 1), (6, 1, 1)])
def test_a_convolution_gives_what_it_gave(name: str, shape: tuple[int, ...]):
    layer = copy.deepcopy(CONVOLUTIONS[name])
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected, weights = layer(images), list(layer.parameters())
    wanted = torch.autograd.grad(expected.sum(), weights)
    multiply_single_pixels(layer)
    found = layer(images)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), weights), wanted)


def test_single_pixels_are_not_convolved(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(*(copy.deepcopy(CONVOLUTIONS[name]) for name in ("depthwise", "1x1")))
    multiply_single_pixels(model)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *_: pytest.fail("convolved"))
    assert model(torch.rand(2, 6, 1, 1)).shape == (2, 4, 1, 1)
