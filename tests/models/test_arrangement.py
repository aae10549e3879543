"""Layers computed in other ways: the same numbers, weights and structure."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers.activations import GELU
from torch import nn
from torch.nn import functional as F

from robust_submission.models.cpu import products
from robust_submission.models.cpu.optimize import (
    activate_channels_last,
    convolve_linear_layers,
    optimize_for_cpu,
)
from robust_submission.models.cpu.small_convolutions import multiply_convolutions

FEATURES = torch.randn(2, 16, 18, 40, generator=torch.Generator().manual_seed(0))


class Doubled(nn.Linear):
    """A layer of a type of its own."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(features)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "features",
    [FEATURES, FEATURES[0], FEATURES[0, 0], FEATURES[0, 0, 0], FEATURES[:0], FEATURES.double()],
)
def test_a_layer_gives_what_it_gave(
    features: torch.Tensor, bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "FEWEST_ROWS", 2)
    layer = nn.Linear(40, 4, bias=bias).to(features.dtype)
    expected = F.linear(features, layer.weight, layer.bias)
    convolve_linear_layers(layer)
    torch.testing.assert_close(layer(features), expected)


@pytest.mark.parametrize("one_size", [True, False])
def test_many_pixels_are_convolved_and_nothing_else(
    one_size: bool, monkeypatch: pytest.MonkeyPatch
):
    calls = list[tuple[int, ...]]()
    convolve = F.conv2d

    def counted(images: torch.Tensor, *arguments: torch.Tensor, **options: int) -> torch.Tensor:
        calls.append(tuple(images.shape))
        return convolve(images, *arguments, **options)

    monkeypatch.setattr(F, "conv2d", counted)
    monkeypatch.setattr(products, "_MKL_LEARNS", False)
    monkeypatch.setattr(products, "FEWEST_ROWS", 2 * 16 * 18 // (1 if one_size else 8))
    model = nn.ModuleList([nn.Linear(40, 4), Doubled(40, 4)])
    convolve_linear_layers(model, one_size=one_size)
    for layer in model:
        layer(FEATURES)
        layer(FEATURES.flatten(0, 2))
        layer(FEATURES[0])  # too few
        with torch.autocast("cpu", torch.bfloat16):
            layer(FEATURES)
        layer.double()(FEATURES.double())  # which oneDNN does not know
    assert calls == 2 * [(1, 40, 2 * 16 * 18, 1)]


@pytest.mark.parametrize("bias", [True, False])
def test_where_onednn_is_slow_to_learn_it_computes_all_but_the_weights_gradient(
    bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "FEWEST_ROWS", 2)
    monkeypatch.setattr(products, "_MKL_LEARNS", True)
    plain = nn.Linear(40, 48, bias=bias)
    layer = copy.deepcopy(plain)
    convolve_linear_layers(layer)
    features = FEATURES.clone().requires_grad_()
    gradients = list[list[torch.Tensor]]()
    for each in (plain, layer):
        inputs = [features, *each.parameters()]
        first = torch.autograd.grad(each(features).square().sum(), inputs, create_graph=True)
        length = sum(gradient.square().sum() for gradient in first)
        gradients.append([*first, *torch.autograd.grad(length, inputs)])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-2)
    with torch.autograd.profiler.profile() as profile:
        layer(features).sum().backward()
    names = [event.name for event in profile.function_events or []]
    assert names.count("aten::conv2d") == 2 and "aten::convolution_backward" not in names
    layer(FEATURES).sum().backward()  # features that need no gradient


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("layer", [nn.Linear(40, 4), nn.Conv2d(40, 4, 1)])
def test_onednn_computes_on_one_thread_too(layer: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "FEWEST_ROWS", 512)
    layer.requires_grad_(False)
    convolve_linear_layers(layer)
    multiply_convolutions(layer)
    images = FEATURES.permute(0, 3, 1, 2) if type(layer) is nn.Conv2d else FEATURES
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autograd.profiler.profile() as profile:
            layer(images)
    finally:
        torch.set_num_threads(threads)
    assert "aten::mkldnn_convolution" in {event.name for event in profile.function_events or []}


def test_a_network_keeps_its_logits_gradients_and_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "FEWEST_ROWS", 9)
    torch.manual_seed(0)
    plain = timm.create_model("test_convnext", num_classes=3, conv_mlp=False)
    arranged = copy.deepcopy(plain)
    optimize_for_cpu(arranged, channels_last=True)
    assert repr(arranged) == repr(plain)
    stem = arranged.get_parameter("stem.0.weight")
    assert stem.is_contiguous(memory_format=torch.channels_last) and not stem.is_contiguous()
    images = torch.rand(9, 3, 32, 32)
    for model in (plain, arranged):
        model(images).square().sum().backward()
    torch.testing.assert_close(arranged(images), plain(images))
    own, other = (dict(model.named_parameters()) for model in (arranged, plain))
    assert own.keys() == other.keys()
    for name, weight in own.items():
        torch.testing.assert_close(weight.grad, other[name].grad, rtol=1e-3, atol=1e-5)


def test_compiled_it_is_one_graph_and_products_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "FEWEST_ROWS", 9)
    network = timm.create_model("test_convnext", num_classes=3, conv_mlp=False).eval()
    optimize_for_cpu(network, channels_last=True)
    images = torch.rand(9, 3, 32, 32)
    expected = network(images)
    graphs = list[torch.fx.GraphModule]()

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    network.compile(backend=keep, fullgraph=True)
    torch.testing.assert_close(network(images), expected)
    (graph,) = graphs
    assert not any(node.kwargs.get("dilation") for node in graph.graph.nodes)


def test_a_copy_computes_with_its_own_weights():
    layer = nn.Linear(40, 4)
    convolve_linear_layers(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
        assert other.bias is not None
        other.bias.zero_()
    assert layer(FEATURES).any() and not other(FEATURES).any()


@pytest.mark.parametrize("build", [nn.GELU, GELU, lambda: nn.GELU("tanh")])
@pytest.mark.parametrize("channels_last", [True, False])
def test_gelu_takes_pixels_in_order_and_gives_what_it_gave(
    build: Callable[[], nn.Module], channels_last: bool, monkeypatch: pytest.MonkeyPatch
):
    in_order = list[bool]()
    gelu = F.gelu

    def seen(features: torch.Tensor, **options: str) -> torch.Tensor:
        in_order.append(features.is_contiguous())
        return gelu(features, **options)

    monkeypatch.setattr(F, "gelu", seen)
    layer, images = build(), FEATURES.permute(0, 3, 1, 2)
    images = images if channels_last else images.contiguous()
    expected = build()(images)
    activate_channels_last(layer)
    found = layer(images)
    assert in_order == [not channels_last, True]
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer(images[0]), expected[0])
