"""What a packaged model.py needs to know of a classifier: its stages and its ConvNeXt, as JSON."""

from typing import Any

import timm.models.convnext as convnext
from timm.layers import activations
from timm.layers import norm as norms
from torch import nn

from robust_submission.models.classifier import Normalize, RobustClassifier
from robust_submission.models.gcm import GCM
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.models.trn import TRN

WEIGHTS = "model.safetensors"
_NORMS: dict[type[nn.Module], str] = {
    norms.LayerNorm: "layer",
    norms.LayerNorm2d: "layer",
    nn.LayerNorm: "layer",
    norms.RmsNorm: "rms",
    norms.RmsNorm2d: "rms",
    norms.SimpleNorm: "variance",
    norms.SimpleNorm2d: "variance",
}
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
    activations.GELU: "gelu",
    activations.GELUTanh: "gelu_tanh",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


class UnsupportedError(ValueError):
    """A part that the packaged model.py has no plain-torch twin of."""


def describe(model: RobustClassifier) -> dict[str, Any]:
    """The CONFIG of a packaged model.py.

    Raises:
        UnsupportedError: a stage, or a part of the backbone, that model.py cannot rebuild.
    """
    assert isinstance(model.normalize, Normalize)
    return {
        "num_classes": len(model.class_names),
        "restore": _restore(model.restore, len(model.class_names)),
        "conceal": _conceal(model.conceal),
        "randomize": _randomize(model.randomize),
        "mean": model.normalize.mean.flatten().tolist(),
        "std": model.normalize.std.flatten().tolist(),
        "backbone": _backbone(model.backbone),
        "weights": WEIGHTS,
    }


def _restore(stage: nn.Module, num_classes: int) -> dict[str, Any] | None:
    if isinstance(stage, nn.Identity):
        return None
    if type(stage) is not TRN or stage.channels != 3:
        raise UnsupportedError(f"the restoration stage {type(stage).__name__}")
    surrogate = stage.surrogate
    return {
        "streams": list(stage.stems),
        "width": stage.head.in_channels // len(stage.stems),
        "depth": stage.depth,
        "fusions": len(stage.fusions),
        "stride": stage.stride,
        "estimator": stage.estimator,
        "top_k": min(stage.top_k or num_classes, num_classes),
        "surrogate": None if surrogate is None else surrogate.arguments,
    }


def _conceal(stage: nn.Module) -> dict[str, float] | None:
    if isinstance(stage, nn.Identity):
        return None
    if type(stage) is not GCM:
        raise UnsupportedError(f"the concealing stage {type(stage).__name__}")
    return {"omega": stage.omega, "epsilon": stage.epsilon}


def _randomize(stage: nn.Module) -> dict[str, int] | None:
    if isinstance(stage, nn.Identity):
        return None
    if type(stage) is not RandomResizePad:
        raise UnsupportedError(f"the random stage {type(stage).__name__}")
    return {"image_size": stage.image_size, "min_size": stage.min_size, "seed": stage.seed}


def _backbone(network: nn.Module) -> dict[str, Any]:
    if type(network) is not convnext.ConvNeXt:
        raise UnsupportedError(f"the backbone {type(network).__name__}")
    head: Any = network.head
    norm_pre: Any = network.norm_pre
    if head.global_pool.pool_type != "avg":
        raise UnsupportedError(f"global pooling by {head.global_pool.pool_type or 'nothing'}")
    hidden = getattr(head, "hidden_size", None)
    return {
        "stem": [_layer(layer) for layer in network.stem],
        "stages": [_stage(stage) for stage in network.stages],
        "norm_pre": _norm(norm_pre),
        "head": {
            "channels": network.num_features,
            "norm": _norm(getattr(head, "norm", nn.Identity())),
            "hidden": hidden,
            "activation": _activation(head.pre_logits.act) if hidden else None,
        },
    }


def _stage(stage: Any) -> dict[str, Any]:
    downsample = [] if isinstance(stage.downsample, nn.Identity) else stage.downsample
    described = [_block(block) for block in stage.blocks]
    if any(block != described[0] for block in described):
        raise UnsupportedError("a stage of unlike blocks")
    return {
        **described[0],
        "depth": len(described),
        "downsample": [_layer(layer) for layer in downsample],
    }


def _block(block: Any) -> dict[str, Any]:
    convolution, expansion = block.conv_dw, block.mlp
    sides = {*convolution.kernel_size, *(2 * padding + 1 for padding in convolution.padding)}
    if len(sides) != 1 or set(convolution.dilation) | set(convolution.stride) != {1}:
        raise UnsupportedError("a dilated, strided or lopsided depthwise convolution")
    if not isinstance(block.shortcut, nn.Identity):
        raise UnsupportedError("a block with a projected shortcut")
    grn = getattr(expansion, "grn", None)
    return {
        "channels": convolution.out_channels,
        "kernel": convolution.kernel_size[0],
        "conv_bias": convolution.bias is not None,
        "norm": _norm(block.norm),
        "hidden": expansion.fc1.weight.shape[0],
        "activation": _activation(expansion.act),
        "grn_eps": None if grn is None else grn.eps,
        "layer_scale": block.gamma is not None,
    }


def _layer(layer: nn.Module) -> list[Any]:
    """Kind and arguments of a layer between blocks."""
    if isinstance(layer, nn.Conv2d):
        if set(layer.dilation) != {1} or type(layer) is not nn.Conv2d:
            raise UnsupportedError("a dilated convolution between stages")
        return ["conv", _convolution(layer)]
    if type(layer) in _ACTIVATIONS:
        return ["activation", {"kind": _activation(layer)}]
    kind, eps = _norm(layer) or ("", 0.0)
    return ["norm", {"channels": len(layer.weight), "kind": kind, "eps": eps}]  # pyright: ignore[reportArgumentType]


def _convolution(layer: nn.Conv2d) -> dict[str, Any]:
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size[0],
        "stride": layer.stride[0],
        "padding": layer.padding[0],
        "bias": layer.bias is not None,
    }


def _norm(layer: nn.Module) -> list[Any] | None:
    """Kind and epsilon; None for an identity."""
    if isinstance(layer, nn.Identity):
        return None
    if type(layer) not in _NORMS:
        raise UnsupportedError(f"the norm {type(layer).__name__}")
    return [_NORMS[type(layer)], float(layer.eps)]  # pyright: ignore[reportArgumentType]


def _activation(layer: nn.Module) -> str:
    if type(layer) not in _ACTIVATIONS or getattr(layer, "approximate", "none") != "none":
        raise UnsupportedError(f"the activation {layer!r}")
    return _ACTIVATIONS[type(layer)]
