"""The config.json of a package: what its model.py needs to know to rebuild a classifier."""

import timm.models.convnext as convnext
from timm.layers import ClassifierHead, Mlp, NormMlpClassifierHead, activations
from timm.layers import norm as norms
from timm.layers.mlp import GlobalResponseNormMlp
from torch import nn

from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import Normalize, RobustClassifier
from robust_submission.models.gcm import GCM
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.models.trn import TRN

Config = dict[str, object]
"""A JSON object."""

_NORM_KINDS: dict[type[nn.Module], str] = {
    norms.LayerNorm: "layer",
    norms.LayerNorm2d: "layer",
    nn.LayerNorm: "layer",
    norms.RmsNorm: "rms",
    norms.RmsNorm2d: "rms",
    norms.SimpleNorm: "variance",
    norms.SimpleNorm2d: "variance",
}
_ACTIVATION_KINDS: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
    activations.GELU: "gelu",
    activations.GELUTanh: "gelu_tanh",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


def package_config(model: RobustClassifier) -> Config:
    """The arguments of every stage, and the layers of the ConvNeXt, as JSON values.

    Raises:
        UserError: the backbone is not a ConvNeXt that the package's model.py can rebuild.
    """
    trn, gcm, randomize = model.restore, model.conceal, model.randomize
    randomizes = isinstance(randomize, RandomResizePad)
    assert isinstance(model.normalize, Normalize)
    return {
        "num_classes": len(model.class_names),
        "image_size": model.image_size,
        "restore": trn.arguments if isinstance(trn, TRN) else None,
        "conceal": _values(gcm, "omega", "epsilon") if isinstance(gcm, GCM) else None,
        "randomize": _values(randomize, "image_size", "min_size", "seed") if randomizes else None,
        "mean": model.normalize.mean.flatten().tolist(),
        "std": model.normalize.std.flatten().tolist(),
        "backbone": _backbone(model.backbone),
    }


def _values(stage: nn.Module, *names: str) -> Config:
    return {name: getattr(stage, name) for name in names}


def _unsupported(part: str) -> UserError:
    return UserError(
        f"expected a ConvNeXt that plain torch can rebuild, found {part}.\n"
        "It would need timm, which the organisers do not have: submit ONNX, --out NAME.onnx."
    )


def _backbone(network: nn.Module) -> Config:
    if not isinstance(network, convnext.ConvNeXt):
        raise _unsupported(f"the backbone {type(network).__name__}")
    stem, norm_pre = network.stem, network.norm_pre
    assert isinstance(stem, nn.Sequential) and isinstance(norm_pre, nn.Module)
    return {
        "stem": [_layer(layer) for layer in stem],
        "stages": [_stage_config(stage) for stage in network.stages],
        "norm_pre": _norm(norm_pre),
        "head": _head(network.head),
    }


def _head(head: nn.Module) -> Config:
    assert isinstance(head, (ClassifierHead, NormMlpClassifierHead))
    if head.global_pool.pool_type != "avg":
        raise _unsupported(f"global pooling by {head.global_pool.pool_type or 'nothing'}")
    config = {"channels": head.in_features, "norm": None, "hidden": None, "activation": None}
    if isinstance(head, NormMlpClassifierHead):
        config["norm"] = _norm(head.norm)
        if head.hidden_size:
            config["hidden"] = head.hidden_size
            config["activation"] = _activation(head.pre_logits.get_submodule("act"))
    return config


def _stage_config(stage: nn.Module) -> Config:
    assert isinstance(stage, convnext.ConvNeXtStage)
    downsample = [] if isinstance(stage.downsample, nn.Identity) else stage.downsample
    blocks = [_block(block) for block in stage.blocks]
    if any(block != blocks[0] for block in blocks):
        raise _unsupported("a stage whose blocks differ")
    layers = [_layer(layer) for layer in downsample]
    block: Config = blocks[0] if blocks else {}
    return {**block, "depth": len(blocks), "downsample": layers}


def _block(block: nn.Module) -> Config:
    assert isinstance(block, convnext.ConvNeXtBlock)
    convolution, mlp = block.conv_dw, block.mlp
    assert isinstance(convolution, nn.Conv2d) and isinstance(mlp, (Mlp, GlobalResponseNormMlp))
    kernel = convolution.kernel_size[0]
    plain = nn.Conv2d(1, 1, kernel, padding=kernel // 2)
    shape = ("kernel_size", "padding", "dilation", "stride")
    if _values(convolution, *shape) != _values(plain, *shape):
        raise _unsupported("a depthwise convolution that is dilated, strided or not square")
    if not isinstance(block.shortcut, nn.Identity):
        raise _unsupported("a block with a projected shortcut")
    return {
        "channels": convolution.out_channels,
        "kernel": kernel,
        "conv_bias": convolution.bias is not None,
        "norm": _norm(block.norm),
        "hidden": len(mlp.fc1.weight),
        "activation": _activation(mlp.act),
        "grn_eps": mlp.grn.eps if isinstance(mlp, GlobalResponseNormMlp) else None,
        "layer_scale": block.gamma is not None,
    }


def _layer(layer: nn.Module) -> list[object]:
    """Kind and arguments of a layer in the stem or between stages."""
    if isinstance(layer, nn.Conv2d):
        if set(layer.dilation) != {1} or type(layer) is not nn.Conv2d:
            raise _unsupported("a dilated convolution between stages")
        arguments = {
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "kernel_size": layer.kernel_size[0],
            "stride": layer.stride[0],
            "padding": layer.padding[0],
            "bias": layer.bias is not None,
        }
        return ["conv", arguments]
    if type(layer) in _ACTIVATION_KINDS:
        return ["activation", {"kind": _activation(layer)}]
    kind, eps = _norm(layer) or ("", 0.0)
    return ["norm", {"channels": len(layer.get_parameter("weight")), "kind": kind, "eps": eps}]


def _norm(layer: nn.Module) -> tuple[str, float] | None:
    """Kind and epsilon; None for an identity."""
    if isinstance(layer, nn.Identity):
        return None
    if type(layer) not in _NORM_KINDS:
        raise _unsupported(f"the norm {type(layer).__name__}")
    return _NORM_KINDS[type(layer)], float(vars(layer)["eps"])


def _activation(layer: nn.Module) -> str:
    if type(layer) not in _ACTIVATION_KINDS or getattr(layer, "approximate", "none") != "none":
        raise _unsupported(f"the activation {layer!r}")
    return _ACTIVATION_KINDS[type(layer)]
