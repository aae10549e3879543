"""A module changed for a while or in part: eval mode, frozen weights, exchanged stages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
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


def replaced(module: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """`module` with some of the modules in it exchanged, sharing everything else.

    Only the modules on the way to an exchanged one are copied, shallowly: parameters, buffers and
    mode are those of the original, which is left as it is. What a model keeps outside its
    registered modules (a plain list, a bound method) is not seen.

    Args:
        module: Any model.
        substitute: Gives the module to put in place of its argument, or None to leave it and look
            inside.

    Returns:
        `module` itself where nothing is exchanged.
    """
    if (other := substitute(module)) is not None:
        return other
    children = {
        name: child if child is None else replaced(child, substitute)
        for name, child in module._modules.items()
    }
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    changed = object.__new__(type(module))  # copy.copy asks the class, and that of FSDP refuses
    changed.__dict__ = module.__dict__ | {"_modules": children}
    return changed


class StraightThrough(nn.Module):
    """A stage's values with the identity's gradient: what an attacker who knows of it uses.

    Args:
        stage: From images (B, 3, H, W), and whatever else it is called with, to images of the same
            shape.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, images: Tensor, *others: object) -> Tensor:
        with torch.no_grad():
            values = self.stage(images.detach(), *others)
        return values + (images - images.detach())  # value + exact zero
