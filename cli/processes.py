"""Starting accelerate the same way in every command."""

from typing import Any

import torch
from accelerate import Accelerator


def start_accelerator(**options: Any) -> Accelerator:
    """An Accelerator for the processes that python, torchrun or accelerate launch started.

    Where there is no GPU the CPU is asked for: accelerate would otherwise take each of several CPU
    processes for a run of its own, unless ACCELERATE_USE_CPU is set.
    """
    return Accelerator(cpu=not torch.accelerator.is_available(), **options)
