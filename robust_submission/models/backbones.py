"""timm, imported without torch's compiler.

    from robust_submission.models.backbones import timm

timm imports torchvision's detection operators, and one of those asks torch._dynamo whether
something can be compiled. Importing torch._dynamo takes longer than all of timm, and what is not
compiled never needs it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch

_COMPILER = "torch._dynamo.utils"


class _Later(ModuleType):
    """A module that is imported when something in it is first asked for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # `inspect` looks for __file__ in every module
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def _is_compile_supported(device_type: str) -> bool:
    return import_module(_COMPILER).is_compile_supported(device_type)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Let the function that torchvision imports import its module at its first call."""
    if _COMPILER in sys.modules:
        yield
        return
    later = sys.modules[_COMPILER] = _Later(_COMPILER)
    vars(later)["is_compile_supported"] = _is_compile_supported
    disable = torch.compiler.disable
    torch.compiler.disable = torch._disable_dynamo
    try:
        yield
    finally:
        torch.compiler.disable = disable
        if sys.modules.get(_COMPILER) is later:
            del sys.modules[_COMPILER]


with _without_compiler():
    import timm

__all__ = ["timm"]
