"""Channels-last weights, linear layers as convolutions: the same numbers, weights and structure."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from models.arrangement import FEWEST_PIXELS, arrange, convolve_linear_layers

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
