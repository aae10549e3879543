"""Convolutions computed as products: the same numbers and gradients."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robust_submission.models.cpu import depthwise, products
from robust_submission.models.cpu.optimize import keep_channels_last
from robust_submission.models.cpu.small_convolutions import multiply_convolutions

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
    monkeypatch.setattr(products, "FEWEST_ROWS", 4)
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
        keep_channels_last(layer)
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
    keep_channels_last(layer)
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


@pytest.mark.skipif(not depthwise._ON_X86, reason="measured on x86 alone")
@pytest.mark.parametrize(("name", "by_columns"), [("depthwise", True), ("depthwise, close", False)])
def test_wide_kernels_learn_by_columns(name: str, by_columns: bool, convolved: list[nn.Module]):
    layer = copy.deepcopy(CONVOLUTIONS[name])
    multiply_convolutions(layer)
    order = {"memory_format": torch.channels_last}
    images = torch.rand(2, 6, 7, 9).contiguous(**order)
    layer(images)
    assert convolved == ([] if by_columns else [layer])
    convolved.clear()
    layer(images.contiguous())
    layer(images[:, :, :6].contiguous(**order))  # lower than the kernel
    layer(images[..., :6].contiguous(**order))  # narrower
    with torch.autocast("cpu", torch.bfloat16):
        layer(images)
    layer.requires_grad_(False)(images)
    assert convolved == 5 * [layer]


@pytest.mark.skipif(not depthwise._ON_X86, reason="measured on x86 alone")
@pytest.mark.parametrize("kernel", [(7, 7), (3, 5), (1, 5), (5, 9), (3, 11)])
def test_the_gradient_by_columns_is_that_of_torch(kernel: tuple[int, int]):
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    images = draw(3, 20, 9, 13).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = draw(20, 1, *kernel).requires_grad_(), draw(20).requires_grad_()
    inputs, around = (images, weight, bias), (kernel[0] // 2, kernel[1] // 2)
    drawn = draw(3, 20, 9, 13)
    for gradient in (drawn, drawn.to(memory_format=torch.channels_last)):
        ours = depthwise.convolve_depthwise(*inputs)
        theirs = F.conv2d(*inputs, padding=around, groups=20)
        found, expected = (torch.autograd.grad(each, inputs, gradient) for each in (ours, theirs))
        torch.testing.assert_close((ours, *found), (theirs, *expected), rtol=1e-4, atol=1e-3)


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
