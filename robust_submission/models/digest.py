"""Names a model by everything that decides its outputs: equal in every process, however it is run.

A module counts with its parts, parameters, buffers, attributes and hooks; a function with its code,
its defaults and the variables that it captures or reads; a class of the user's with its methods.
What is installed, or ours, counts by its name. Mode, device, memory format, `requires_grad`, the
layers of `models.cpu` and the draw of a random stage do not count, nor does the seed or state of a
random generator, which may be new in each process.
"""

import copyreg
import dis
import hashlib
import random
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from robust_submission.models.cpu.optimize import ProductLinear, original_type
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.models.user_function import is_users_file

_EVERY_MODULES = frozenset(nn.Module().__dict__)
"""Attributes that torch gives every module: mode, hooks, tensors, parts."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_THE_RUN = ((ProductLinear, "few"), (RandomResizePad, "draw"))
"""Attributes that say how a layer is run."""
_ORIGIN = re.compile(r"_hub_mixin_\w+|(pretrained|default)_cfg")
"""Attributes in which huggingface_hub and timm keep where a model is from."""
_AS_WRITTEN = (
    *(type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented)),
    *(torch.dtype, torch.layout, torch.memory_format, np.dtype),
)
"""Types whose `repr` says everything."""
_WITHOUT_STATE = (
    *(torch.device, torch.Generator, random.Random, np.random.Generator, np.random.RandomState),
    *(np.random.BitGenerator, np.random.SeedSequence),
)
_COMPILED = (
    *(types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
)
"""Functions and descriptors without Python code."""
_DESCRIPTORS = (types.FunctionType, classmethod, staticmethod, property)


def module_digest(module: nn.Module) -> str:
    """Name a module; see above."""
    return _Walk().name(module).hex()[:32]


def function_digest(function: object) -> str:
    """Name any other callable, as far as Python can look into it."""
    return _Walk().name(function).hex()[:32]


def source_digest(module: str) -> str:
    """Name the user's source code of a module: every imported file in its folder or package.

    Args:
        module: As in `sys.modules`: `net`, `package.net`, `path/to/net.py`.

    Returns:
        Empty if no such module is imported, or if it is installed or ours.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file or not is_users_file(file):
        return ""
    root = Path(file).resolve().parent
    if not module.endswith(".py"):
        package = module.count(".") - (Path(file).name != "__init__.py")
        root = root.parents[package - 1] if package > 0 else root
    paths = set[Path]()
    for name, imported in list(sys.modules.items()):
        path = getattr(imported, "__dict__", {}).get("__file__")  # getattr may import
        if path and is_users_file(path) and (name != "__main__" or name == module):
            paths.add(Path(path).resolve())
    mine = sorted(path for path in paths if path.is_relative_to(root) and path.is_file())
    parts = [(str(path.relative_to(root)).encode(), path.read_bytes()) for path in mine]
    return _named("source", *(part for pair in parts for part in pair)).hex()[:32]


def _named(kind: str, *parts: bytes) -> bytes:
    state = hashlib.sha256(kind.encode())
    for part in parts:
        state.update(hashlib.sha256(part).digest())
    return state.digest()


class _Walk:
    """Names objects by what they hold, each once."""

    def __init__(self) -> None:
        self._named = dict[int, tuple[object, bytes]]()  # the object too: its id stays its own
        self._within = list[int]()

    def name(self, value: Any) -> bytes:
        if type(value) in _AS_WRITTEN:
            return _named(type(value).__name__, repr(value).encode())
        if (place := id(value)) in self._named:
            return self._named[place][1]
        if place in self._within:  # a circle
            return _named("above", str(self._within.index(place)).encode())
        self._within.append(place)
        kind, inside = next(
            (kind, inside) for known, kind, inside in _KINDS if isinstance(value, known)
        )
        parts = [part if type(part) is bytes else self.name(part) for part in inside(value)]
        found = _named(kind, *(sorted(parts) if kind == "set" else parts))
        self._within.pop()
        self._named[place] = value, found
        return found


def _inside_tensor(tensor: Tensor) -> list[Any]:
    plain = tensor.detach()
    plain = plain.dequantize() if plain.is_quantized else plain
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    facts = [str(plain.dtype), tuple(plain.shape)]
    if plain.is_meta:
        return facts
    values = plain.cpu().resolve_conj().resolve_neg().contiguous()
    return [*facts, values.view(-1).view(torch.uint8).numpy().tobytes()]


def _inside_array(array: np.ndarray) -> list[Any]:
    values = array.tolist() if array.dtype.hasobject else array.tobytes()
    return [str(array.dtype), array.shape, values]


def _inside_module(module: nn.Module) -> list[Any]:
    if isinstance(module, torch.jit.ScriptModule):
        return [dict(module.named_parameters()), dict(module.named_buffers()), _script(module)]
    if isinstance(whole := module._modules.get("_orig_mod"), nn.Module):  # of torch.compile
        return [whole]
    tensors = [dict(sorted(each.items())) for each in (module._parameters, module._buffers)]
    hooks = [list(getattr(module, name).values()) for name in _HOOKS]
    common = [*tensors, dict(module._modules.items()), hooks]
    if isinstance(module, fx.GraphModule):
        return [*common, module.code]
    attributes = {
        name: value
        for name, value in sorted(module.__dict__.items())
        if name not in _EVERY_MODULES and not _ORIGIN.fullmatch(name)
        if not any(isinstance(module, kind) and name == other for kind, other in _OF_THE_RUN)
    }
    return [original_type(module), *common, attributes]


def _script(module: torch.jit.ScriptModule) -> str:
    """Methods and attributes, without addresses, lines of files, mode and device."""
    text: str = module._c.dump_to_str(True, True, False)  # pyright: ignore
    return re.sub(r"0x[0-9a-f]+|#.*|training = \w+|CPU|CUDA", "", text)


def _inside_class(kind: type) -> list[Any]:
    if not _is_users_module(kind.__module__):
        return [f"{kind.__module__}.{kind.__qualname__}"]
    members = {
        name: value
        for name, value in sorted(vars(kind).items())
        if isinstance(value, _DESCRIPTORS) or not name.startswith("__")
        if not name.startswith("__annot")
    }
    return [kind.__qualname__, kind.__bases__, members]


def _inside_imported(module: types.ModuleType) -> list[Any]:
    file = getattr(module, "__file__", None)
    if file and is_users_file(file) and Path(file).is_file():
        return [Path(file).read_bytes()]
    return [module.__name__]


def _inside_function(function: types.FunctionType) -> list[Any]:
    held = [function.__defaults__, function.__kwdefaults__, function.__closure__]
    if not is_users_file(function.__code__.co_filename):
        return [f"{function.__module__}.{function.__qualname__}", *held]
    known = function.__globals__
    read = sorted(set(_globals_read(function.__code__)) & known.keys())
    return [function.__code__, *held, {name: known[name] for name in read}, function.__dict__]


def _globals_read(code: types.CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _globals_read(inner)


def _inside_cell(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty: its function is still being made
        return []


def _inside_object(value: Any) -> list[Any]:
    """As pickle and copy take it apart; its type and attributes if it does not let them."""
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        found = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception:  # the object's own code: anything
        return [type(value), dict(sorted(getattr(value, "__dict__", {}).items()))]
    if isinstance(found, str):  # the name of something global, such as a function with a cache
        return [found, getattr(value, "__wrapped__", None)]
    function, arguments, *state = found
    parts = [list(part) if isinstance(part, Iterator) else part for part in state]
    return [function, arguments, *parts]


def _is_users_module(name: str) -> bool:
    """Whether a module of that name is neither Python's, nor installed, nor ours."""
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names:
        return False
    found = (getattr(sys.modules.get(each), "__file__", None) for each in (name, root))
    file = next(filter(None, found), None)
    return file is None or is_users_file(file)


_KINDS: tuple[tuple[Any, str, Callable[[Any], Iterable[Any]]], ...] = (
    (_WITHOUT_STATE, "", lambda value: [type(value)]),
    (Tensor, "tensor", _inside_tensor),
    (np.generic, "value", lambda value: [value.item()]),
    (np.ndarray, "array", _inside_array),
    (nn.Module, "module", _inside_module),
    (type, "class", _inside_class),
    (dict, "dict", lambda value: [part for pair in value.items() for part in pair]),
    ((list, tuple), "sequence", list),  # in JSON the one becomes the other
    ((set, frozenset), "set", list),
    (types.FunctionType, "function", _inside_function),
    (types.CodeType, "code", lambda v: [v.co_code, v.co_names, v.co_varnames, v.co_consts]),
    (types.CellType, "cell", _inside_cell),
    (types.MethodType, "method", lambda value: [value.__func__, value.__self__]),
    ((classmethod, staticmethod), "method", lambda value: [type(value), value.__func__]),
    (property, "property", lambda value: [value.fget, value.fset]),
    (types.ModuleType, "imported", _inside_imported),
    (_COMPILED, "compiled", lambda v: [v.__qualname__, getattr(v, "__self__", None)]),
    (object, "object", _inside_object),
)
"""How to look into a value of these types: the bytes and the values that it consists of."""
