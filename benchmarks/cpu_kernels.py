"""What does each of the CPU's kernels (`models/cpu`) gain?

    python benchmarks/cpu_kernels.py

First single layers, torch's beside ours. Then whole works: each row of a table is a way to compute
the same work; the ratio is its time over that of all kernels, so what a kernel gains stands in the
row without it. Beside them: channels-last weights alone, timm's network as it comes, and where it
applies its constructor's argument `conv_mlp`. All take turns on one thread; times are CPU seconds
of the fastest round, which other processes on a shared machine disturb least.
"""

import copy
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from peak import ATTO, KINDS, TINY, Work
from robust_submission.cli.command import run
from robust_submission.models.cpu import optimize_for_cpu, products
from robust_submission.models.cpu.convolutions import ProductConv2d
from robust_submission.models.cpu.optimize import RowsGELU
from robust_submission.runtime import keep_freed_memory
from timing import print_table, take_turns


def depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 7, padding=3, groups=channels)


ALL, LAYERS_TITLE = "all kernels", "single layers"
PATCHES = {"patch_size": 2}  # as in the recipes for 32 px
WORKS = (
    Work("prediction", TINY, 224, 4),
    Work("training", TINY, 224, 4),
    Work("training", TINY, 32, 16, PATCHES),
    Work("PGD-10", TINY, 32, 4, PATCHES),
    Work("training", ATTO, 32, 32, PATCHES),
    Work("PGD-10", ATTO, 32, 16, PATCHES),
    Work("training", TINY, 32, 32),
)
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], bool]] = {
    "1x1, 320 to 1,280 channels, 2x2": (nn.Conv2d(320, 1280, 1), (32, 320, 2, 2), True),
    "patches of 2, 160 to 320 channels, 4x4": (nn.Conv2d(160, 320, 2, 2), (32, 160, 4, 4), True),
    "patches of 2, 384 to 768 channels, 4x4": (nn.Conv2d(384, 768, 2, 2), (32, 384, 4, 4), True),
    "patches of 4, 3 to 96 channels, 32x32": (nn.Conv2d(3, 96, 4, 4), (32, 3, 32, 32), True),
    "depthwise 7x7, 768 channels, 1x1": (depthwise(768), (32, 768, 1, 1), True),
    "depthwise 7x7, 768 channels, 2x2": (depthwise(768), (32, 768, 2, 2), True),
    "depthwise 7x7, 192 channels, 8x8": (depthwise(192), (32, 192, 8, 8), True),
    "depthwise 7x7, 384 channels, 14x14": (depthwise(384), (4, 384, 14, 14), True),
    "linear, 12,544 rows, 96 to 384": (nn.Linear(96, 384), (12544, 96), True),
    "GELU, 640 channels, 4x4": (nn.GELU(), (32, 640, 4, 4), False),
}
"""By name, a layer, the shape of what it takes, and whether it has weights."""


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    rounds: int = 12
    """How often each is measured."""
    works: str = ""
    """Those whose titles contain this, such as training, or layers."""


def never(*_: object) -> None:
    """No, and no part of a kernel."""


Context = AbstractContextManager[Any]
ALL_ON: Context = nullcontext()
KERNELS: dict[str, Context] = {
    "products by oneDNN": patch.object(products, "FEWEST_ROWS", inf),
    "1x1 kernels as products": patch.object(ProductConv2d, "multiplies_pixels", never),
    "patches as products": patch.object(ProductConv2d, "multiplies_patches", never),
    "kernels of one place": patch.object(ProductConv2d, "part_over", never),
    "depthwise gradient by pairs": patch.object(ProductConv2d, "multiplies_pairs", never),
    "depthwise gradient by columns": patch.object(ProductConv2d, "gains_by_columns", never),
    "GELU by rows": patch.object(RowsGELU, "forward", nn.GELU.forward),
}
"""By name, a context in which a kernel is off."""


def compute(
    work: Work, batch: tuple[Tensor, Tensor], network: nn.Module, off: Context = ALL_ON
) -> None:
    """Do the work once, in a context in which a kernel is off."""
    with off:
        KINDS[work.kind][0](network, *batch)


def compare(work: Work, rounds: int) -> list[list[str]]:
    """A row for each way to compute."""
    once = partial(compute, work, work.batch())

    def build(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return work.build(**options)

    fast = build()
    optimize_for_cpu(fast, channels_last=True)
    ways = {ALL: partial(once, fast)}
    ways |= {f"without {name}": partial(once, fast, off) for name, off in KERNELS.items()}
    ways["channels-last alone"] = partial(once, build().to(memory_format=torch.channels_last))
    ways["timm as it comes"] = partial(once, build())
    if work.backbone != ATTO:  # which has it
        convolutions = build(conv_mlp=True).to(memory_format=torch.channels_last)
        ways["channels-last, conv_mlp"] = partial(once, convolutions)
    seconds = take_turns(ways, rounds, clock=time.process_time)
    fastest = {name: min(times) for name, times in seconds.items()}
    return [[name, f"{each / fastest[ALL]:.2f}"] for name, each in fastest.items()]


def pass_through(layer: nn.Module, images: Tensor, trains: bool) -> None:
    """Forward and backward, as in an attack or, with the weights' gradient too, in training."""
    layer.requires_grad_(trains).zero_grad()
    output = layer(images)
    output.backward(torch.ones_like(output))
    images.grad = None


def compare_layers(rounds: int) -> list[list[str]]:
    """A row for each layer and what it is computed for."""
    rows = list[list[str]]()
    for name, (layer, shape, has_weights) in LAYERS.items():
        fast = nn.Sequential(copy.deepcopy(layer))
        optimize_for_cpu(fast, channels_last=True)
        images = torch.rand(shape)
        if len(shape) == 4:
            images = images.contiguous(memory_format=torch.channels_last)
            layer.to(memory_format=torch.channels_last)
        images.requires_grad_()
        for kind, trains in [("attack", False), ("training", True)][: 1 + has_weights]:
            ways = {
                way: partial(pass_through, network, images, trains)
                for way, network in (("torch", layer), ("ours", fast))
            }
            seconds = take_turns(ways, rounds, clock=time.process_time)
            torchs, ours = (1e3 * min(times) for times in seconds.values())
            rows.append([name, kind, f"{torchs:.1f}", f"{ours:.1f}", f"{torchs / ours:.2f}"])
    return rows


def work_through(options: Options) -> None:
    """Measure the layers and all works, and print a table of each."""
    keep_freed_memory()
    torch.set_num_threads(1)
    if options.works in LAYERS_TITLE:
        header = ("layer", "for", "torch, ms", "kernel, ms", "times as fast")
        print_table(header, compare_layers(options.rounds))
    for work in WORKS:
        title = f"{work}, patches of {work.arguments.get('patch_size', 4)}"
        if options.works in title:
            rows = compare(work, options.rounds)
            print(f"\n{title}\n")
            print_table(("computed", "time, over that with all kernels"), rows)


if __name__ == "__main__":
    run(work_through, Options)
