"""What does each of the CPU's kernels (`models/cpu`) gain?

    python benchmarks/cpu_kernels.py

Each row of a table is a way to compute the same work; the ratio is its time over that of all
kernels, so what a kernel gains stands in the row without it. Beside them: channels-last weights
alone, timm's network as it comes, and where it applies its constructor's argument `conv_mlp`. All
take turns on one thread; times are CPU seconds of the fastest round, which other processes on a
shared machine disturb least.
"""

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

ALL = "all kernels"
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


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    rounds: int = 12
    """How often each is measured."""
    works: str = ""
    """Those whose titles contain this, such as training."""


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


def work_through(options: Options) -> None:
    """Measure all works and print a table of each."""
    keep_freed_memory()
    torch.set_num_threads(1)
    for work in WORKS:
        title = f"{work}, patches of {work.arguments.get('patch_size', 4)}"
        if options.works in title:
            rows = compare(work, options.rounds)
            print(f"\n{title}\n")
            print_table(("computed", "time, over that with all kernels"), rows)


if __name__ == "__main__":
    run(work_through, Options)
