"""What does each of the CPU's kernels (`models/cpu`) gain?

    python benchmarks/cpu_kernels.py

Each row of a table is a way to compute the same work; the ratio is its time over that of all
kernels, so what a kernel gains stands in the row without it. Beside them: channels-last weights
alone, timm's network as it comes, and where it applies its constructor's argument `conv_mlp`. All
take turns on one thread; times are CPU seconds of the fastest round, which other processes on a
shared machine disturb least.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import nn

from peak import CLASSES, Work, attack, predict, train
from robust_submission.cli.command import run
from robust_submission.models.cpu import optimize_for_cpu, products
from robust_submission.models.cpu.convolutions import ProductConv2d
from robust_submission.models.cpu.optimize import RowsGELU
from robust_submission.runtime import keep_freed_memory
from timing import print_table, take_turns

ALL = "all kernels"


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    rounds: int = 12
    """How often each is measured."""
    works: list[str] = field(default_factory=list)
    """Those whose names contain one of these; empty for all."""


PATCHES = {"patch_size": 2}  # as in the recipes for 32 px
WORKS = (
    Work(
        name="prediction, ConvNeXt-Tiny, 224 px",
        backbone="convnext_tiny",
        image_size=224,
        batch_size=4,
        once=predict,
        passes=1,
    ),
    Work(
        name="training, ConvNeXt-Tiny, 224 px",
        backbone="convnext_tiny",
        image_size=224,
        batch_size=4,
        once=train,
        passes=3,
    ),
    Work(
        name="training, ConvNeXt-Tiny, 32 px",
        backbone="convnext_tiny",
        image_size=32,
        batch_size=16,
        once=train,
        passes=3,
        arguments=PATCHES,
    ),
    Work(
        name="PGD-10, ConvNeXt-Tiny, 32 px",
        backbone="convnext_tiny",
        image_size=32,
        batch_size=4,
        once=attack,
        passes=20,
        arguments=PATCHES,
    ),
    Work(
        name="training, ConvNeXt-Atto, 32 px",
        backbone="convnext_atto",
        image_size=32,
        batch_size=32,
        once=train,
        passes=3,
        arguments=PATCHES,
    ),
    Work(
        name="PGD-10, ConvNeXt-Atto, 32 px",
        backbone="convnext_atto",
        image_size=32,
        batch_size=16,
        once=attack,
        passes=20,
        arguments=PATCHES,
    ),
    Work(
        name="training, ConvNeXt-Tiny in patches of 4, 32 px",
        backbone="convnext_tiny",
        image_size=32,
        batch_size=32,
        once=train,
        passes=3,
    ),
)


def never(*_: object) -> None:
    """No, and no part of a kernel."""


@contextmanager
def plain_gelu() -> Iterator[None]:
    with patch.object(RowsGELU, "forward", nn.GELU.forward):
        yield


KERNELS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "products by oneDNN": lambda: patch.object(products, "FEWEST_ROWS", inf),
    "1x1 kernels as products": lambda: patch.object(ProductConv2d, "multiplies_pixels", never),
    "patches as products": lambda: patch.object(ProductConv2d, "multiplies_patches", never),
    "kernels of one place": lambda: patch.object(ProductConv2d, "part_over", never),
    "depthwise gradient by pairs": lambda: patch.object(ProductConv2d, "multiplies_pairs", never),
    "depthwise gradient by columns": lambda: patch.object(ProductConv2d, "gains_by_columns", never),
    "GELU by rows": plain_gelu,
}
"""By name, a context in which a kernel is off."""


def ways(work: Work) -> dict[str, Callable[[], None]]:
    """All that is compared, by name."""
    images = torch.rand(work.batch_size, 3, work.image_size, work.image_size)
    labels = torch.arange(work.batch_size) % CLASSES

    def build(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(work.backbone, num_classes=CLASSES, **work.arguments, **options)

    def way(
        network: nn.Module, without: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> Callable[[], None]:
        def once() -> None:
            with without():
                work.once(network, images, labels)

        return once

    fast = build()
    optimize_for_cpu(fast, channels_last=True)
    found = {ALL: way(fast)}
    found |= {f"without {name}": way(fast, without) for name, without in KERNELS.items()}
    last = {"memory_format": torch.channels_last}
    found["channels-last alone"] = way(build().to(**last))
    found["timm as it comes"] = way(build())
    if "atto" not in work.backbone:  # which has it
        found["channels-last, conv_mlp"] = way(build(conv_mlp=True).to(**last))
    return found


def compare(options: Options) -> None:
    """Measure all works and print a table of each."""
    keep_freed_memory()
    torch.set_num_threads(1)
    wanted = options.works or [""]
    for work in WORKS:
        if not any(part in work.name for part in wanted):
            continue
        seconds = take_turns(ways(work), options.rounds, clock=time.process_time)
        print(f"\n{work.name}, batch {work.batch_size}\n")
        fastest = {name: min(times) for name, times in seconds.items()}
        rows = [[name, f"{each / fastest[ALL]:.2f}"] for name, each in fastest.items()]
        print_table(("computed", "time, over that with all kernels"), rows)


if __name__ == "__main__":
    run(compare, Options)
