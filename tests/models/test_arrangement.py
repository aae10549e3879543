"""Layers computed in other ways: the same numbers, weights and structure."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.layers.activations import GELU
from torch import nn
from torch.nn import functional as F

from models import arrangement
from models.arrangement import (
    activate_channels_last,
    arrange,
    convolve_linear_layers,
    fewest_pixels,
    multiply_convolutions,
)

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
    monkeypatch.setattr(arrangement, "FEWEST_PIXELS", 2)
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
    monkeypatch.setattr(arrangement, "_AVX2_ALONE", False)
    monkeypatch.setattr(arrangement, "FEWEST_PIXELS", 2 * 16 * 18 // (1 if one_size else 8))
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


def test_weights_that_learn_are_left_to_mkl_where_onednn_is_slow_to(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(arrangement, "FEWEST_PIXELS", 2)
    monkeypatch.setattr(arrangement, "_AVX2_ALONE", True)
    monkeypatch.setattr(F, "conv2d", lambda *_, **__: pytest.fail("convolved"))
    layer = nn.Linear(40, 4)
    convolve_linear_layers(layer)
    layer(FEATURES)
    with pytest.raises(pytest.fail.Exception), torch.no_grad():
        layer(FEATURES)
    layer.requires_grad_(False)
    with pytest.raises(pytest.fail.Exception):
        layer(FEATURES.clone().requires_grad_())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("layer", [nn.Linear(40, 4), nn.Conv2d(40, 4, 1)])
def test_onednn_computes_on_one_thread_too(layer: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrangement, "FEWEST_PIXELS", 512)
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


PROCESSORS = {
    "zen3": ("AuthenticAMD", 25, True, 4096),
    "zen4": ("AuthenticAMD", 25, False, 512),
    "zen5": ("AuthenticAMD", 26, False, 64),
    "zen5 without avx512": ("AuthenticAMD", 26, True, 4096),
    "intel": ("GenuineIntel", 6, False, 8192),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processor_says_when_onednn_is_faster(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    vendor, family, avx2_alone, expected = PROCESSORS[name]
    monkeypatch.setattr(arrangement, "_AVX2_ALONE", avx2_alone)
    core = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\n"
    path = tmp_path / "cpuinfo"
    path.write_text(f"{core}power management:\n\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\n")
    assert fewest_pixels(path) == expected


def test_an_unknown_processor_is_taken_for_an_ordinary_one(tmp_path: Path):
    path = tmp_path / "cpuinfo"
    assert fewest_pixels(path) == 512
    path.write_text("processor\t: 0\nCPU implementer\t: 0x41\nFeatures\t: fp asimd\n")
    assert fewest_pixels(path) == 512


def test_a_network_keeps_its_logits_gradients_and_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrangement, "FEWEST_PIXELS", 9)
    torch.manual_seed(0)
    plain = timm.create_model("test_convnext", num_classes=3, conv_mlp=False)
    arranged = copy.deepcopy(plain)
    arrange(arranged, channels_last=True)
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
    monkeypatch.setattr(arrangement, "FEWEST_PIXELS", 9)
    network = timm.create_model("test_convnext", num_classes=3, conv_mlp=False).eval()
    arrange(network, channels_last=True)
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


CONVOLUTIONS = {
    "1x1": nn.Conv2d(6, 4, 1),
    "1x1, no bias": nn.Conv2d(6, 4, 1, bias=False),
    "1x1, strided": nn.Conv2d(6, 4, 1, stride=2),
    "1x1, padded": nn.Conv2d(6, 4, 1, padding=1),
    "1x1, depthwise": nn.Conv2d(6, 6, 1, groups=6),
    "patches": nn.Conv2d(6, 4, 2, stride=2),
    "oblong patches": nn.Conv2d(6, 4, (2, 4), stride=(2, 4), bias=False),
    "patches, depthwise": nn.Conv2d(6, 6, (2, 3), stride=2, padding=(0, 1), groups=6),
    "wide patches": nn.Conv2d(6, 4, 4, stride=4, padding=1),
    "3x3": nn.Conv2d(6, 4, 3, padding=1, bias=False),
    "depthwise": nn.Conv2d(6, 6, 7, padding=3, groups=6),
    "depthwise, far around": nn.Conv2d(6, 6, 3, padding=3, groups=6),
    "depthwise, close": nn.Conv2d(6, 6, 5, padding=1, groups=6),
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


SHAPES = [
    (90, 6, 8, 8),
    (3, 6, 1, 1),
    (3, 6, 2, 2),
    (3, 6, 5, 2),
    (3, 6, 3, 3),
    (3, 6, 4, 4),
    (0, 6, 2, 2),
    (6, 2, 2),
]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_convolution_gives_what_it_gave(
    name: str, shape: tuple[int, ...], channels_last: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(arrangement, "FEWEST_PIXELS", 4)
    layer = copy.deepcopy(CONVOLUTIONS[name])
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    try:
        expected = layer(images)  # in standard order
    except RuntimeError:  # an image that the kernel does not fit
        multiply_convolutions(layer)
        with pytest.raises(RuntimeError):
            layer(images)
        return
    wanted = torch.autograd.grad(expected.sum(), [images, *layer.parameters()])
    multiply_convolutions(layer)
    if channels_last and len(shape) == 4:
        images = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        arrangement.keep_channels_last(layer)
    found = layer(images)
    torch.testing.assert_close(found, expected)
    given = torch.autograd.grad(found.sum(), [images, *layer.parameters()])
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers that nn.Conv2d computed."""
    layers = list[nn.Module]()
    convolve = nn.Conv2d.forward

    def counted(layer: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        layers.append(layer)
        return convolve(layer, images)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    return layers


@pytest.mark.parametrize(
    ("side", "gradient", "multiplied"),
    [(8, False, True), (10, False, False), (10, True, True), (32, True, True), (34, True, False)],
)
def test_few_patches_are_multiplied_and_more_with_a_gradient(
    side: int, gradient: bool, multiplied: bool, convolved: list[nn.Module]
):
    layer = copy.deepcopy(CONVOLUTIONS["patches"]).requires_grad_(False)
    multiply_convolutions(layer)
    images = torch.rand(2, 6, side, side, requires_grad=gradient)
    layer(images)
    assert convolved == [layer]  # weights that are not channels-last
    arrangement.keep_channels_last(layer)
    layer(images)
    assert convolved == (1 if multiplied else 2) * [layer]


SUMMED = [
    ("depthwise", 1, True),
    ("depthwise", 4, True),
    ("depthwise", 5, False),  # too many pairs
    ("depthwise, close", 4, True),
    ("depthwise, close", 5, False),  # as large as the kernel
]


@pytest.mark.parametrize(("name", "side", "summed"), SUMMED)
def test_small_images_are_summed_where_the_weights_learn(
    name: str, side: int, summed: bool, convolved: list[nn.Module]
):
    layer = copy.deepcopy(CONVOLUTIONS[name])
    multiply_convolutions(layer)
    images = torch.rand(2, 6, side, side)
    layer(images)
    assert convolved == ([] if summed else [layer])
    convolved.clear()
    layer.requires_grad_(False)(images)
    assert convolved == ([] if side == 1 else [layer])  # around one pixel it has one place


PRODUCTS = {
    "depthwise": 1,
    "3x3": 1,
    "1x1": 5,
    "1x1, strided": 5,
    "patches": 2,
    "wide patches": 3,
}
"""With images of which side."""


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_a_product_is_not_convolved(name: str, monkeypatch: pytest.MonkeyPatch):
    layer = copy.deepcopy(CONVOLUTIONS[name])
    side = PRODUCTS[name]
    images = torch.rand(2, 6, side, side).contiguous(memory_format=torch.channels_last)
    expected = layer(images).shape
    multiply_convolutions(layer)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *_: pytest.fail("convolved"))
    assert layer(images).shape == expected


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
