"""The CPU's kernels against torch's own layers: the same numbers, gradients and names."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers.activations import GELU
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.models.cpu import convolutions, optimize_for_cpu, products

FEATURES = torch.randn(2, 16, 18, 40, generator=torch.Generator().manual_seed(0))
COLUMNS = "columns" if convolutions._ON_X86 else "torch"
EVERY = 3 * ("product",)
NONE = 3 * ("torch",)


def depthwise_conv(kernel: int | tuple[int, int], padding: int | tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(6, 6, kernel, padding=padding, groups=6)


CONVOLUTIONS = {
    "1x1": (nn.Conv2d(6, 4, 1), (90, 6, 8, 8), EVERY),
    "1x1, no bias": (nn.Conv2d(6, 4, 1, bias=False), (3, 6, 1, 1), EVERY),
    "1x1, strided": (nn.Conv2d(6, 4, 1, stride=2), (3, 6, 5, 2), EVERY),
    "1x1, strided, a block": (nn.Conv2d(16, 4, 1, stride=2), (2, 16, 5, 5), NONE),
    "1x1, padded": (nn.Conv2d(6, 4, 1, padding=1), (2, 6, 2, 2), NONE),
    "16 patches": (nn.Conv2d(6, 4, 2, stride=2), (2, 6, 8, 8), EVERY),
    "25 patches": (nn.Conv2d(6, 4, 2, stride=2), (2, 6, 10, 10), ("product", "product", "torch")),
    "289 patches": (nn.Conv2d(6, 4, 2, stride=2), (2, 6, 34, 34), NONE),
    "patches, an edge left": (nn.Conv2d(6, 4, 2, stride=2), (2, 6, 5, 5), NONE),
    "oblong patches": (nn.Conv2d(6, 4, (2, 4), (2, 4), bias=False), (2, 6, 8, 8), EVERY),
    "one place": (nn.Conv2d(6, 4, 3, padding=1, bias=False), (3, 6, 1, 1), EVERY),
    "one place, lopsided": (nn.Conv2d(6, 4, 4, stride=4, padding=1), (3, 6, 2, 2), EVERY),
    "four places": (nn.Conv2d(6, 4, 3, padding=1), (3, 6, 2, 2), NONE),
    "no images": (nn.Conv2d(6, 4, 3, padding=1), (0, 6, 1, 1), EVERY),
    "an image": (nn.Conv2d(6, 4, 1), (6, 2, 2), NONE),
    "depthwise, one place": (depthwise_conv(7, 3), (3, 6, 1, 1), ("pairs", "sum", "sum")),
    "depthwise, 4x4": (depthwise_conv(7, 3), (3, 6, 4, 4), ("pairs", "torch", "torch")),
    "depthwise, far around": (depthwise_conv(3, 3), (3, 6, 2, 2), ("pairs", "torch", "torch")),
    "depthwise, too many pairs": (depthwise_conv(7, 3), (3, 6, 5, 5), NONE),
    "depthwise, wide": (depthwise_conv(7, 3), (3, 6, 7, 9), (COLUMNS, "torch", "torch")),
    "depthwise, 5x9": (depthwise_conv((5, 9), (2, 4)), (3, 6, 9, 13), (COLUMNS, "torch", "torch")),
    "depthwise, narrow": (depthwise_conv(3, 1), (3, 6, 7, 9), NONE),
    "depthwise, smaller": (depthwise_conv(5, 1), (3, 6, 7, 9), NONE),
    "dilated": (nn.Conv2d(6, 4, 3, padding=2, dilation=2), (3, 6, 1, 1), NONE),
    "two groups": (nn.Conv2d(6, 4, 3, padding=1, groups=2), (3, 6, 1, 1), NONE),
    "two per channel": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (3, 6, 1, 1), NONE),
    "same": (nn.Conv2d(6, 4, 3, padding="same"), (3, 6, 1, 1), NONE),
    "circular": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (3, 6, 3, 3), NONE),
}
"""Layer, shape of its images, and what computes it in training, attacks and prediction."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has computed convolutions."""
    calls = list[str]()

    def spy(owner: object, function: str, name: str) -> None:
        original = getattr(owner, function)

        def called(*arguments: object) -> object:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, function, called)

    spy(convolutions, "product", "product")
    spy(convolutions, "sum_of_pairs", "pairs")
    spy(convolutions, "convolve_by_columns", "columns")
    spy(nn.Conv2d, "forward", "torch")
    return calls


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_torch_s(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "FEWEST_ROWS", 4)
    layer, shape, expected_calls = CONVOLUTIONS[name]
    plain, ours = copy.deepcopy(layer), copy.deepcopy(layer)
    optimize_for_cpu(ours, channels_last=True)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for (trained, attacked), computed_by in zip(
        ((True, True), (False, True), (False, False)), expected_calls, strict=True
    ):
        results = list[list[Tensor]]()
        for each in (plain.requires_grad_(trained), ours.requires_grad_(trained)):
            images = drawn.clone()
            if each is ours and len(shape) == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            images.requires_grad_(attacked)
            calls.clear()
            found = each(images)
            inputs = [images] * attacked + [*each.parameters()] * trained
            gradients = torch.autograd.grad(found.square().sum(), inputs) if inputs else []
            results.append([found, *gradients])
        assert (calls or ["sum"])[0] == computed_by
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_convolutions_in_another_order_or_precision_are_torch_s(calls: list[str]):
    wide, patches = depthwise_conv(7, 3), nn.Conv2d(6, 4, 2, stride=2)
    optimize_for_cpu(nn.ModuleList([wide, patches]), channels_last=False)
    images = torch.rand(2, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    patches(images)  # weights that are not channels-last
    wide(images.contiguous())
    with torch.autocast("cpu", torch.bfloat16):
        wide(images)
    wide.double()(images.double())
    assert calls == 4 * ["torch"]


@pytest.mark.parametrize("by_mkl", [True, False])
def test_a_linear_layer_is_torch_s(by_mkl: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "FEWEST_ROWS", 2)
    monkeypatch.setattr(products, "_GRADIENT_BY_MKL", by_mkl)
    torch.manual_seed(0)
    for bias in (True, False):
        plain = nn.Linear(40, 48, bias=bias)
        ours = copy.deepcopy(plain)
        optimize_for_cpu(ours, channels_last=False)
        for features in (FEATURES, FEATURES[0], FEATURES[0, 0, 0], FEATURES[:0]):
            torch.testing.assert_close(ours(features), plain(features))
        features = FEATURES.clone().requires_grad_()
        gradients = list[list[Tensor]]()
        for layer in (plain, ours):
            inputs = [features, *layer.parameters()]
            first = torch.autograd.grad(layer(features).square().sum(), inputs, create_graph=True)
            length = sum(gradient.square().sum() for gradient in first)
            gradients.append([*first, *torch.autograd.grad(length, inputs)])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-2)
        with torch.autograd.profiler.profile() as profile:
            ours(features).sum().backward()
        names = [event.name for event in profile.function_events or []]
        assert ("aten::convolution_backward" in names) is not by_mkl


@pytest.mark.parametrize("one_size", [True, False])
def test_many_rows_of_float32_are_convolved(one_size: bool, monkeypatch: pytest.MonkeyPatch):
    calls, convolve = list[tuple[int, ...]](), F.conv2d

    def counted(images: Tensor, *arguments: Tensor, **options: int) -> Tensor:
        calls.append(tuple(images.shape))
        return convolve(images, *arguments, **options)

    monkeypatch.setattr(F, "conv2d", counted)
    monkeypatch.setattr(products, "FEWEST_ROWS", 2 * 16 * 18 // (1 if one_size else 8))
    layer = nn.Linear(40, 4).requires_grad_(False)
    optimize_for_cpu(layer, channels_last=False, one_size=one_size)
    layer(FEATURES)
    layer(FEATURES[0])  # too few
    with torch.autocast("cpu", torch.bfloat16):
        layer(FEATURES)
    layer.double()(FEATURES.double())  # which oneDNN does not know
    assert calls == [(1, 40, 2 * 16 * 18, 1)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_onednn_computes_on_one_thread_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "FEWEST_ROWS", 512)
    layer = nn.Linear(40, 4).requires_grad_(False)
    optimize_for_cpu(layer, channels_last=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autograd.profiler.profile() as profile:
            layer(FEATURES)
    finally:
        torch.set_num_threads(threads)
    assert "aten::mkldnn_convolution" in {event.name for event in profile.function_events or []}


@pytest.mark.parametrize("build", [nn.GELU, GELU, lambda: nn.GELU("tanh")])
def test_gelu_of_channels_last_images_has_rows_of_pixels(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
):
    in_order, gelu = list[bool](), F.gelu

    def seen(features: Tensor, **options: str) -> Tensor:
        in_order.append(features.is_contiguous())
        return gelu(features, **options)

    layer, images = build(), FEATURES.permute(0, 3, 1, 2)
    optimize_for_cpu(layer, channels_last=False)
    monkeypatch.setattr(F, "gelu", seen)
    found = layer(images)
    assert in_order == [True] and found.stride() == images.stride()
    torch.testing.assert_close(found, build()(images))
    torch.testing.assert_close(layer(images[0]), build()(images[0]))
    assert repr(layer) == repr(build())


class Doubled(nn.Linear):
    """A layer of the user's own type."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_network_keeps_its_logits_gradients_and_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "FEWEST_ROWS", 9)
    torch.manual_seed(0)
    plain = timm.create_model("test_convnext", num_classes=3, conv_mlp=False)
    plain = nn.Sequential(plain, Doubled(3, 3))
    ours = copy.deepcopy(plain)
    optimize_for_cpu(ours, channels_last=True)
    optimize_for_cpu(ours, channels_last=True, one_size=False)
    assert repr(ours) == repr(plain) and type(ours[1]) is Doubled
    stem = ours.get_parameter("0.stem.0.weight")
    assert stem.is_contiguous(memory_format=torch.channels_last) and not stem.is_contiguous()
    images = torch.rand(9, 3, 32, 32)
    for model in (plain, ours):
        model(images).square().sum().backward()
    torch.testing.assert_close(ours(images), plain(images))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for own, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_compiled_it_is_one_graph_without_products(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "FEWEST_ROWS", 9)
    network = timm.create_model("test_convnext", num_classes=3, conv_mlp=False).eval()
    optimize_for_cpu(network, channels_last=True)
    images, graphs = torch.rand(9, 3, 32, 32), list[torch.fx.GraphModule]()
    expected = network(images)

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    network.compile(backend=keep, fullgraph=True)
    torch.testing.assert_close(network(images), expected)
    (graph,) = graphs
    assert not any(node.kwargs.get("dilation") for node in graph.graph.nodes)


@pytest.mark.parametrize(
    ("instructions", "without_avx512", "rows"),
    [
        ({"sse4a": True}, True, 3072),  # Zen 3
        ({"sse4a": True}, False, 512),  # Zen 4
        ({"sse4a": True, "avx_vnni": True}, False, 64),  # Zen 5
        ({"sse4a": False, "avx_vnni": True}, False, 8192),  # Intel
        ({}, True, 8192),  # not x86, or not known
    ],
)
def test_onednn_multiplies_from_how_many_rows(
    instructions: dict[str, bool], without_avx512: bool, rows: int
):
    assert products.fewest_rows(instructions, without_avx512) == rows
