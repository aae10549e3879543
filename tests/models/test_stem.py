"""A convolutional stem: its layers, its place in a checkpoint, and what trains it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import load_checkpoint
from robust_submission.models.stem import put_conv_stem

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(**options: Any) -> RobustClassifier:
    torch.manual_seed(0)
    arguments = {"class_names": ["a", "b"], "backbone": "test_convnext", "stem": "conv"} | options
    return RobustClassifier(image_size=32, **arguments).eval()


@pytest.mark.parametrize(
    ("arguments", "strides"),
    [
        ({}, [2, 2]),
        ({"patch_size": 2}, [2, 1]),
        ({"patch_size": 1, "depths": [0, 1, 1, 1]}, [1, 1]),
        ({"patch_size": 2, "act_layer": "silu", "conv_bias": False}, [2, 1]),
        ({"stem_type": "overlap_tiered"}, [2, 2]),
    ],
)
def test_it_shrinks_the_image_as_the_network_does(arguments: dict[str, Any], strides: list[int]):
    network: Any = timm.create_model("test_convnext", **arguments)
    before = [each.shape for each in network.forward_intermediates(IMAGES)[1]]
    put_conv_stem(network)
    assert [each.shape for each in network.forward_intermediates(IMAGES)[1]] == before
    first, norm, activation, second, last = network.stem
    assert (first.stride[0], second.stride[0]) == tuple(strides)
    assert (first.out_channels, second.out_channels) == (12, 24)
    assert isinstance(activation, nn.SiLU) == ("act_layer" in arguments)
    assert (first.bias is None) == (second.bias is None) == ("conv_bias" in arguments)
    for layer in (norm, last):  # over the channels of each pixel
        values = layer(torch.rand(1, len(layer.weight), 4, 4))
        torch.testing.assert_close(values.mean(1), torch.zeros(1, 4, 4), atol=1e-5, rtol=0)


def test_a_checkpoint_rebuilds_it(tmp_path: Path):
    model = build(backbone_args={"act_layer": "silu", "patch_size": 2})
    model.save_pretrained(tmp_path)
    for loaded in (load_checkpoint(tmp_path), RobustClassifier.from_pretrained(tmp_path)):
        assert torch.equal(loaded(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "test_resnet"}, "stem: expected patch, or a ConvNeXt, found ResNet"),
        ({"backbone_args": {"patch_size": 8}}, "or a patch_size of 1, 2 or 4, found 8"),
        ({"stem": "overlap"}, "stem: .*'patch' or 'conv'"),
    ],
)
def test_what_has_no_such_stem_is_named(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        build(**options)


@pytest.mark.parametrize("act_layer", ["gelu", "silu"])
def test_kernels_of_the_cpu_give_the_same(act_layer: str):
    model = build(conceal=False, backbone_args={"patch_size": 2, "act_layer": act_layer})
    other = copy.deepcopy(model)
    optimize_for_cpu(other.backbone, channels_last=True)
    logits, same = model(IMAGES), other(IMAGES)
    torch.testing.assert_close(same, logits, atol=1e-5, rtol=1e-4)
    logits.square().sum().backward()
    same.square().sum().backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, atol=1e-5, rtol=1e-3, msg=name)
