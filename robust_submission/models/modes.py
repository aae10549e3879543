"""Modes that a network is in for a while: evaluating, and frozen."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.tensor import DTensor


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode and every part of it back in its own mode afterwards."""
    trained = [part for part in module.modules() if part.training]
    for part in trained:
        part.training = False
    try:
        yield
    finally:
        for part in trained:
            part.training = True


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Have no weight of a module require a gradient, and those that did require one afterwards.

    For where the images' gradient alone is wanted, by an attack or for a gradient map. Else a
    forward pass keeps what the weights' gradients need, in ConvNeXt half of all that is kept, and
    the backward pass of a compiled module, or of `models.products` on some processors, computes
    them (docs/results/speed.md). Sharded weights stay as they are: FSDP computes with other
    tensors, which it makes from them when they are first used.
    """
    learned = [
        weight
        for weight in module.parameters()
        if weight.requires_grad and not isinstance(weight, DTensor)
    ]
    for weight in learned:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learned:
            weight.requires_grad_(True)
