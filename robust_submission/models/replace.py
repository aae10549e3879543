"""Exchange modules inside a model without touching the model."""

from collections.abc import Callable

from torch import nn


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
