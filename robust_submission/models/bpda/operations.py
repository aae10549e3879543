"""What is known of torch's operations by name, and the arguments of their calls."""

import sys
from collections.abc import Callable, Iterator
from enum import Flag, auto
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAT = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "floor_divide", "__floordiv__"}
"""Operations whose derivative is zero wherever it exists."""
SLOPED = {
    *("sin", "cos", "tan", "tanh", "sigmoid", "erf", "atan", "arctan", "softsign"),
    *("frac", "remainder", "fmod", "__mod__", "clamp", "clip", "hardtanh", "hardsigmoid", "relu6"),
}
"""Operations on single values whose derivative may be far from the slope of their values."""
RISING = {"gt", "ge", "greater", "greater_equal", "__gt__", "__ge__"}
FALLING = {"lt", "le", "less", "less_equal", "__lt__", "__le__"}
"""Comparisons, by the sign of their slope in the first argument."""
PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
REPLACING = {"where", "masked_fill", "scatter", "index_put", *PRODUCTS}
"""Operations that drop some of the values; a product does so if a factor is a mask."""
POINTWISE = {
    *("add", "sub", "div", "true_divide", "neg", "clone", "contiguous", "minimum", "maximum"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__truediv__", "__neg__", "rsub"),
    *("float", "to", "type", "type_as", "double", "half", "bfloat16", "byte", "int", "long"),
    *("bool", "detach", "cpu", "cuda", "logical_not", "__invert__", "bitwise_and", "__and__"),
    *("__get__", "__lshift__", "__rshift__", *FLAT, *SLOPED, *PRODUCTS),
}
"""Operations after which a value without a gradient still stands for the value before them."""
LOOKUPS = {"embedding", "__getitem__", "one_hot", "index_select", "gather", "take"}
"""Operations that read values at integer places."""
UNCHANGED = {"clone", "contiguous", "dropout", "to", "float", "view", "reshape", "requires_grad_"}
"""Operations that change no value in eval mode, with the gradient of the identity."""
EXPORTS = {"numpy", "tolist", "__array__", "item"}
"""Ways out of torch."""

_HERE = Path(__file__).parent
_UNNAMED = tuple(map(str, (Path(torch.__file__).parent, _HERE, _HERE.parent / "cpu")))
"""Folders of code that is not the model's own."""


class Through(Flag):
    """What the gradient is passed straight through."""

    OPERATIONS = auto()
    """Operations without a derivative that follows their values, and cuts of the graph."""
    MASKS = auto()
    """Operations that drop values, such as winners-take-all."""
    IMAGES = auto()
    """Whatever makes images of the same shape from the images."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a call's arguments or results, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The arguments of a call with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: with_tensors(each, change) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(with_tensors(each, change) for each in value)
    return value


def place() -> str:
    """File and line of the model's code that is being run."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_UNNAMED):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
