"""Change a module for a while or in part: eval mode, frozen weights, exchanged stages, compiled."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and every part of it back in its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Switch off `requires_grad` of a module's weights, and on again afterwards where it was on.

    For attacks and gradient maps, which need the gradient of the images alone. Otherwise a forward
    pass keeps activations for the gradients of the weights, in ConvNeXt half of all that it keeps,
    and the backward pass of a compiled module, and of some kernels of `models.cpu`, computes them.
    Sharded weights are left as they are: FSDP computes with other tensors, made from them when they
    are first used.
    """
    trained = [
        weight
        for weight in module.parameters()
        if weight.requires_grad and not isinstance(weight, DTensor)
    ]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def replaced(module: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """`module` with some of the modules in it exchanged, sharing everything else.

    Only the modules on the way to an exchanged one are copied, shallowly: parameters, buffers and
    mode are those of the original, which is left as it is. What was compiled is not any more, and a
    `forward` that a wrapper has put on a module (accelerate's autocast) is that of the copy. What a
    model keeps outside its registered modules (a plain list, a bound method) is not seen.

    Args:
        module: Any model.
        substitute: Returns the module to put in place of its argument, or None to keep it and
            look inside.

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
    if (compiled := children.get("_orig_mod")) is not None:  # of torch.compile
        return compiled
    changed = object.__new__(type(module))  # copy.copy asks the class, and that of FSDP refuses
    own = module.__dict__ | {"_modules": children, "_compiled_call_impl": None}
    forward = own.pop("forward", None)  # else it would call the original
    if isinstance(forward, MethodType):
        own["forward"] = MethodType(forward.__func__, changed)
    elif type(module).forward is nn.Module.forward:  # its class has none
        own["forward"] = forward
    changed.__dict__ = own
    return changed


class Compiled(nn.Module):
    """A network compiled for batches of any size, as an evaluation makes them.

    Each is filled up with zeros to a power of two, so that there are few sizes: CUDA graphs are
    recorded anew for each. An output is copied, since the next run of a graph overwrites it. Hooks
    in the network are not seen, and it cannot be differentiated twice.

    Args:
        network: From images (B, C, H, W) to logits, each image alone; left as it is.
        mode: Of torch.compile; see `runtime.compile_mode`.
    """

    SMALLEST = 8
    """Smallest batch that the network sees."""

    def __init__(self, network: nn.Module, mode: str | None) -> None:
        super().__init__()
        self.network = torch.compile(copy.copy(network), mode=mode)  # it marks its argument

    def forward(self, images: Tensor) -> Tensor:
        count = len(images)
        size = max(self.SMALLEST, 1 << (count - 1).bit_length())
        filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, size - count))
        return self.network(filled)[:count].clone()


class StraightThrough(nn.Module):
    """A stage with the identity's gradient: the straight-through estimator of BPDA.

    Args:
        stage: From images (B, 3, H, W), and further arguments, to images of the same shape.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, images: Tensor, *others: object) -> Tensor:
        with torch.no_grad():
            values = self.stage(images.detach(), *others)
        return values + (images - images.detach())  # value + exact zero
