"""A classifier behind its defences, in plain torch: `from model import Model; Model()`.

Input: images (N, 3, H, W), floating point, 0 to 1, channel order BGR. Output: logits (N, classes),
float32. Train and eval mode give the same logits, and nothing is drawn from a global generator.
For Python 3.9 and torch 2.0, and newer. Beside this file: config.json, the weights
(model.safetensors), and the sources of the stages (gcm.py, resize_pad.py, trn/).

The stages are attributes of the model, in this order: `restore` (TRN), `conceal` (GCM),
`randomize` (resize-and-pad), `normalize`, `backbone` (ConvNeXt); an unused one is an identity. An
adaptive attack passes the gradient straight through `conceal`, differentiates
`restore.gradient_map` too (`DifferentiableTRN`), and averages over `randomize.draw` = 0, 1, 2, …
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from gcm import GCM  # pyright: ignore[reportMissingImports]
from resize_pad import RandomResizePad  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from trn import TRN  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).resolve().parent
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Model(nn.Module):
    """BGR images to logits."""

    def __init__(self) -> None:
        super().__init__()
        config = json.loads((HERE / "config.json").read_text())
        restore, conceal, randomize = config["restore"], config["conceal"], config["randomize"]
        self.restore = TRN(**restore) if restore else nn.Identity()
        self.conceal = GCM(**conceal) if conceal else nn.Identity()
        self.randomize = RandomResizePad(**randomize) if randomize else nn.Identity()
        self.normalize = Normalize(config["mean"], config["std"])
        self.backbone = ConvNeXt(config["backbone"], config["num_classes"])
        load_weights(self, HERE / "model.safetensors")

    def forward(self, images: Tensor) -> Tensor:
        images = images.float().flip(1)  # BGR to RGB
        if not isinstance(self.restore, nn.Identity):
            images = self.restore(images, self.classify)
        return self.classify(self.randomize(self.conceal(images)))

    def classify(self, images: Tensor) -> Tensor:
        """Logits of RGB images, without the other stages."""
        return self.backbone(self.normalize(images))


class Normalize(nn.Module):
    """(images - mean) / std, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list, std: list) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Norm(nn.Module):
    """Normalise the last axis: by mean and variance, by root mean square, or by variance alone."""

    def __init__(self, channels: int, kind: str, eps: float) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        if kind == "layer":
            self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        rms = self.kind == "rms"
        spread = x.pow(2).mean(-1, keepdim=True) if rms else x.var(-1, keepdim=True)
        return x * torch.rsqrt(spread + self.eps) * self.weight


class ChannelsFirstNorm(Norm):
    """Norm for (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def activation(kind: str) -> nn.Module:
    """gelu, gelu_tanh, silu or relu."""
    if kind.startswith("gelu"):
        return nn.GELU(approximate="tanh" if kind == "gelu_tanh" else "none")
    return nn.SiLU() if kind == "silu" else nn.ReLU()


class ResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2 (arXiv 2301.00808), for (N, H, W, C)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        strength = x.pow(2).sum((1, 2), keepdim=True).sqrt()
        share = strength / (strength.mean(-1, keepdim=True) + self.eps)
        return x + self.weight * (x * share) + self.bias


class Expansion(nn.Module):
    """A layer as wide as `hidden` between two linear ones, for (N, H, W, C)."""

    def __init__(self, channels: int, stage: dict) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, stage["hidden"])
        self.act = activation(stage["activation"])
        grn = stage["grn_eps"]
        self.grn = nn.Identity() if grn is None else ResponseNorm(stage["hidden"], grn)
        self.fc2 = nn.Linear(stage["hidden"], channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.act(self.fc1(x))))


class Block(nn.Module):
    """Depthwise convolution, norm, expansion, layer scale, and the way around them."""

    def __init__(self, stage: dict) -> None:
        super().__init__()
        channels, kernel = stage["channels"], stage["kernel"]
        padding, bias = kernel // 2, stage["conv_bias"]
        self.conv_dw = nn.Conv2d(
            channels, channels, kernel, padding=padding, groups=channels, bias=bias
        )
        self.norm = Norm(channels, *stage["norm"])
        self.mlp = Expansion(channels, stage)
        self.gamma = nn.Parameter(torch.ones(channels)) if stage["layer_scale"] else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))  # (N, H, W, C)
        if self.gamma is not None:
            y = y * self.gamma
        return x + y.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one width, behind the layers that halve the picture."""

    def __init__(self, stage: dict) -> None:
        super().__init__()
        self.downsample = nn.Sequential(*map(build, stage["downsample"]))
        self.blocks = nn.Sequential(*[Block(stage) for _ in range(stage["depth"])])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    """Average over the picture, norm, perhaps one hidden layer, classes."""

    def __init__(self, head: dict, num_classes: int) -> None:
        super().__init__()
        channels = head["channels"]
        self.norm = Norm(channels, *head["norm"]) if head["norm"] else nn.Identity()
        self.pre_logits = nn.Sequential()
        if head["hidden"]:
            self.pre_logits.add_module("fc", nn.Linear(channels, head["hidden"]))
            self.pre_logits.add_module("act", activation(head["activation"]))
        self.fc = nn.Linear(head["hidden"] or channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pre_logits(self.norm(x.mean((2, 3)))))


class ConvNeXt(nn.Module):
    """A ConvNet for the 2020s (arXiv 2201.03545): stem, stages of blocks, head."""

    def __init__(self, config: dict, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*map(build, config["stem"]))
        self.stages = nn.Sequential(*map(Stage, config["stages"]))
        self.norm_pre = nn.Sequential()
        if config["norm_pre"]:
            self.norm_pre = ChannelsFirstNorm(config["head"]["channels"], *config["norm_pre"])
        self.head = Head(config["head"], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm_pre(self.stages(self.stem(images))))


def build(layer: list) -> nn.Module:
    """A layer from its kind and its arguments."""
    kind, arguments = layer
    kinds = {"conv": nn.Conv2d, "norm": ChannelsFirstNorm, "activation": activation}
    return kinds[kind](**arguments)


def read_safetensors(path: Path) -> dict:
    """Tensors by name: a length, a JSON table and raw bytes; nothing is executed."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
        content = bytearray(file.read())
    table.pop("__metadata__", None)
    tensors = {}
    for name, entry in table.items():
        dtype, shape, start = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"][0]
        flat = torch.frombuffer(content, dtype=dtype, count=math.prod(shape), offset=start)
        tensors[name] = flat.view(shape)
    return tensors


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill every parameter from the file, and use every tensor of it."""
    tensors = read_safetensors(path)
    parameters = dict(model.named_parameters())
    if set(tensors) != set(parameters):
        different = sorted(set(tensors) ^ set(parameters))
        raise ValueError(f"{path}: expected the model's parameters, differs in {different[0]}.")
    for name, parameter in parameters.items():
        # The weight of a 1 x 1 convolution is that of a linear layer.
        parameter.data.copy_(tensors[name].view(parameter.shape))
