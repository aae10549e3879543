"""Run a script on a GPU that is pretended: it computes on the CPU, and mixing devices is an error.

    python tests/pretended_gpu.py inference/predict.py --checkpoint runs/quickstart --out sub.csv

What a GPU would refuse is refused here as well: an operation on tensors of both devices, and numpy
on one of its own. How fast a GPU is, its precision, compiling and autocast are not pretended.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretended"
_aten: Any = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


class OnGPU(Tensor):
    """A tensor of the device, around the one of the CPU that holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{NAME}:0",
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _compute(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {NAME} to numpy")

    __array__ = numpy

    # What is saved is told from other tensors by where it lies.
    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    storage = untyped_storage

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)


class _Pretend(TorchDispatchMode):
    """Has what is made on the device, of nothing or of the CPU's tensors, computed too."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _compute(function, args, kwargs or {})


def _compute(function: Any, args: Any, kwargs: Any) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    ours = {id(each.inner): each for each in tensors if isinstance(each, OnGPU)}
    _check(function, args, tensors)
    on_gpu = bool(ours)
    if kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif function is _aten.copy_.default:
        on_gpu = isinstance(args[0], OnGPU)

    def inside(each: Any) -> Any:
        return each.inner if isinstance(each, OnGPU) else each

    def outside(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return ours[id(each)] if id(each) in ours else OnGPU(each)

    found = function(*tree_map(inside, args), **tree_map(inside, kwargs))
    return tree_map(outside, found) if on_gpu else found


def _check(function: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise where a GPU would: for both devices in one operation.

    The CPU's numbers, copies, and a tensor of the GPU indexed by one of the CPU are allowed.
    """
    if function in _COPIES:
        return
    if function in _INDEXING and isinstance(args[0], OnGPU):
        tensors = [args[0], *args[2:3]]
    where = {isinstance(each, OnGPU) for each in tensors if each.ndim or isinstance(each, OnGPU)}
    if len(where) > 1:
        raise RuntimeError(f"{function}: expected tensors on one device, found {NAME} and cpu.")


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    torch.__future__.set_swap_module_params_on_conversion(True)  # the optimizer holds them already
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    with _Pretend():
        runpy.run_path(sys.argv[0], run_name="__main__")
