"""A classifier behind its defences, in plain torch and numpy: `from model import Model; Model()`.

Input: images (N, 3, H, W), floating point, 0 to 1, channel order BGR. Output: logits (N, classes),
float32. The weights lie beside this file. Train and eval mode compute the same; nothing is drawn
from a global generator. Written for Python 3.6 and torch 1.5, and whatever came after.

Stages, each an attribute of the model, in order: `restore` (TRN, see trn.py), `conceal` (GCM),
`randomize` (resize-and-pad), `normalize`, `backbone` (ConvNeXt). An attack that knows of GCM passes
the gradient straight through `conceal`; one that knows of resize-and-pad averages over
`model.randomize.draw` = 0, 1, 2, …; one that knows of TRN sets `model.restore.differentiable`.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG: dict = {}  # filled in by the packager
MASK32 = 0xFFFFFFFF


class Model(nn.Module):
    """BGR images to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.restore = None
        if CONFIG["restore"]:
            from trn import TRN

            self.restore = TRN(CONFIG["restore"])
        self.conceal = GCM(**CONFIG["conceal"]) if CONFIG["conceal"] else nn.Identity()
        self.randomize = ResizePad(**CONFIG["randomize"]) if CONFIG["randomize"] else nn.Identity()
        self.normalize = Normalize(CONFIG["mean"], CONFIG["std"])
        self.backbone = ConvNeXt(CONFIG["backbone"], CONFIG["num_classes"])
        load_weights(self, Path(__file__).resolve().parent / CONFIG["weights"])

    def forward(self, images: Tensor) -> Tensor:
        images = images.float().flip(1)  # BGR to RGB
        if self.restore is not None:
            images = self.restore(images, self.classify)
        return self.classify(self.randomize(self.conceal(images)))

    def classify(self, images: Tensor) -> Tensor:
        """Logits of RGB images without the other stages."""
        return self.backbone(self.normalize(images))


class GCM(nn.Module):
    """x + epsilon * sin(omega * x) on raw RGB pixels (arXiv 2205.10617)."""

    def __init__(self, omega: float, epsilon: float) -> None:
        super().__init__()
        self.omega = omega
        self.epsilon = epsilon

    def forward(self, images: Tensor) -> Tensor:
        return images + self.epsilon * torch.sin(self.omega * images)


def mix(state: Tensor) -> Tensor:
    """Scramble the 32 bits of each number."""
    for _ in range(2):
        state = ((state >> 16) ^ state) * 0x45D9F3B & MASK32
    return (state >> 16) ^ state


class ResizePad(nn.Module):
    """Shrink each image to a side, and pad it back at a place, that a hash of its pixels draws."""

    def __init__(self, image_size: int, min_size: int, seed: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.min_size = min_size
        self.seed = seed
        self.draw = 0

    def key(self, images: Tensor) -> Tensor:
        """(N,), from 0 to 2**32 - 1, from the pixels rounded to 8 bits, the seed and the draw."""
        levels = (images.detach() * 255).round().to(torch.int64).flatten(1)
        places = torch.arange(levels.shape[1], device=levels.device)
        content = mix(levels + places * 512).sum(1)
        return mix((content + (self.seed * 0x9E3779B1 + self.draw & MASK32)) & MASK32)

    def lines(self, side: Tensor, start: Tensor) -> tuple:
        """For each output line the input line to copy, and whether it lies in the picture."""
        line = torch.arange(self.image_size, device=side.device) - start[:, None]
        inside = (line >= 0) & (line < side[:, None])
        line = torch.where(inside, line, torch.zeros_like(line)) * self.image_size
        return line // side[:, None], inside

    def forward(self, images: Tensor) -> Tensor:
        key = self.key(images)
        side = self.min_size + key % (self.image_size - self.min_size)
        free = self.image_size - side + 1
        rows, row_inside = self.lines(side, mix(key ^ 0x5BD1E995) % free)
        columns, column_inside = self.lines(side, mix(key ^ 0x27D4EB2F) % free)
        images = images.gather(2, rows[:, None, :, None].expand_as(images))
        images = images.gather(3, columns[:, None, None, :].expand_as(images))
        inside = row_inside[:, None, :, None] & column_inside[:, None, None, :]
        return images * inside.to(images.dtype)


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


class Activation(nn.Module):
    """gelu, gelu_tanh, silu or relu."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "gelu":
            return F.gelu(x)
        if self.kind == "gelu_tanh":
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
        return x * torch.sigmoid(x) if self.kind == "silu" else F.relu(x)


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
        self.act = Activation(stage["activation"])
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
            self.pre_logits.add_module("act", Activation(head["activation"]))
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
    kinds = {"conv": nn.Conv2d, "norm": ChannelsFirstNorm, "activation": Activation}
    return kinds[kind](**arguments)


def read_safetensors(path: Path) -> dict:
    """Tensors by name, float32: a length, a JSON table and raw bytes; nothing is executed."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length).decode())
        content = file.read()
    table.pop("__metadata__", None)
    return {name: to_tensor(content, entry) for name, entry in table.items()}


def to_tensor(content: bytes, entry: dict) -> Tensor:
    """One tensor of a safetensors file."""
    start, end = entry["data_offsets"]
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
    numbers = np.frombuffer(content[start:end], dtype=kind)
    if entry["dtype"] == "BF16":  # the upper half of a float32
        numbers = (numbers.astype("<u4") << 16).view("<f4")
    return torch.from_numpy(numbers.astype(np.float32)).view(entry["shape"])


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill every parameter from the file, and use every tensor of it."""
    tensors = read_safetensors(path)
    parameters = dict(model.named_parameters())
    if set(tensors) != set(parameters):
        different = sorted(set(tensors) ^ set(parameters))
        raise ValueError(f"{path}: expected the model's parameters, differs in {different[0]}.")
    for name, parameter in parameters.items():
        # A 1 x 1 convolution's weight serves as a linear layer's.
        parameter.data.copy_(tensors[name].view(parameter.shape))
