"""Products of float32 matrices on a CPU: by oneDNN, as 1x1 convolutions, or by MKL.

On x86, torch leaves the products of linear layers to MKL, which uses half of AMD's newer
processors, and convolutions to oneDNN, which sorts the weights anew in each call. So products of
many rows are convolutions, and those of few are not (docs/results/speed.md).
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == "AVX2"
_FEWEST_VALUES = 20_480
"""With no more in an image, torch itself leaves oneDNN out (use_mkldnn in its Convolution.cpp)."""


def read_processor(description: Path = Path("/proc/cpuinfo")) -> tuple[str, int]:
    """Vendor and family of this processor; "" and 0 where they are not told.

    Args:
        description: Linux's, of which the first core is read. Others have none.
    """
    found = dict[str, str]()
    if description.exists():
        with description.open() as lines:
            for line in itertools.takewhile(str.strip, lines):
                name, _, value = line.partition(":")
                found[name.strip()] = value.strip()
    return found.get("vendor_id", ""), int(found.get("cpu family", 0))


def fewest_rows(vendor: str, family: int) -> int:
    """How many rows a product needs for oneDNN to be faster than MKL on a processor.

    MKL has vectors of 256 bits on AMD's processors: all of Zen 3 and before, about what Zen 4 can
    do in a cycle, and half of what Zen 5 (family 26) can. Where it has all, as on Intel's, it only
    falls behind with many rows.
    """
    match vendor:
        case "GenuineIntel":
            return 8192
        case "AuthenticAMD" if _AVX2_ALONE:
            return 3072
        case "AuthenticAMD" if family >= 26:
            return 64
        case _:
            return 512


_VENDOR, _FAMILY = read_processor()
FEWEST_ROWS = fewest_rows(_VENDOR, _FAMILY)
"""Products of fewer rows are left to MKL."""
_MKL_LEARNS = _AVX2_ALONE or _VENDOR == "GenuineIntel"
"""The gradient of a product's weights stays MKL's, whatever the rows: oneDNN takes three times as
long without AVX-512 (measured on an AMD EPYC of Zen 3), and up to 1.5 times as long on Intel's."""


def product(features: Tensor, weight: Tensor, bias: Tensor | None, *, times: int = 1) -> Tensor:
    """F.linear, within rounding: by oneDNN where that is faster.

    Args:
        features: (..., in).
        weight: (out, in).
        bias: (out,).
        times: So many times `FEWEST_ROWS` rows are few.

    Returns:
        (..., out).
    """
    rows = features.shape[:-1].numel()
    few = rows < times * FEWEST_ROWS or features.numel() <= _FEWEST_VALUES
    if few or not is_arranged(features):
        return F.linear(features, weight, bias)
    if _MKL_LEARNS and gradient_follows(weight):
        return _Learning.apply(features, weight, bias)
    return _convolved(features, weight, bias)


def is_arranged(features: Tensor) -> bool:
    """Whether how these are computed is chosen here: float32 on a CPU, by oneDNN or MKL.

    In half precision F.linear is oneDNN's, and faster; a compiler would copy what it convolves.
    """
    single = features.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    by_onednn = features.device.type == "cpu" and _HAS_ONEDNN
    return by_onednn and single and not torch.compiler.is_compiling()


def _convolved(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    image = features.reshape(1, -1, 1, features.shape[-1]).permute(0, 3, 1, 2)
    # Dilating one pixel changes nothing; a kernel not dilated torch leaves to MKL on one thread.
    convolved = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return convolved.permute(0, 2, 3, 1).reshape(*features.shape[:-1], -1)


class _Learning(torch.autograd.Function):
    """A convolution whose weights' gradient is MKL's.

    Its backward pass computes that whatever it is asked for; torch's own would leave it out where
    the images' gradient alone is wanted, so freeze the weights there (`models.modes.frozen`).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(features, weight)
        return _convolved(features, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        (gradient,), (features, weight) = gradients, ctx.saved_tensors
        of_features, _, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            product(gradient, weight.T, None) if of_features else None,
            rows.T @ features.flatten(0, -2),
            rows.sum(0) if of_bias else None,
        )


def gradient_follows(tensor: Tensor) -> bool:
    """Whether a backward pass would compute its gradient."""
    return tensor.requires_grad and torch.is_grad_enabled()
