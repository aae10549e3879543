"""Products of float32 matrices on a CPU: by oneDNN, as 1x1 convolutions, or by MKL.

On x86, torch leaves linear layers to MKL, which uses half the vector width of AMD's newer
processors, and convolutions to oneDNN, which reorders the weights in each call. So products of many
rows run as convolutions, and those of few do not (docs/results/cpu_kernels.md).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_WITHOUT_AVX512 = torch.backends.cpu.get_cpu_capability() != "AVX512"
_FEWEST_VALUES = 20_480
"""With no more in an image, torch itself leaves oneDNN out (use_mkldnn in its Convolution.cpp)."""


def fewest_rows(instructions: Mapping[str, object], without_avx512: bool = _WITHOUT_AVX512) -> int:
    """From how many rows on oneDNN multiplies faster than MKL.

    Args:
        instructions: Of the processor, as `torch.cpu.get_capabilities` names them. SSE4a is AMD's
            alone. There MKL has vectors of 256 bits: all that Zen 3 has, about what Zen 4 can do in
            a cycle, and half of what Zen 5 can, which has AVX-VNNI too.
        without_avx512: Whether torch's own kernels have no AVX-512.
    """
    if not instructions.get("sse4a"):
        return 8192
    if without_avx512:
        return 3072
    return 64 if instructions.get("avx_vnni") else 512


_INSTRUCTIONS: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
FEWEST_ROWS = fewest_rows(_INSTRUCTIONS)
"""Products of fewer rows are left to MKL."""
_GRADIENT_BY_MKL = _WITHOUT_AVX512 or not _INSTRUCTIONS.get("sse4a")
"""Whether MKL computes the gradient of the weights, whatever the rows: oneDNN takes three times as
long without AVX-512 (measured on an AMD EPYC of Zen 3), and up to 1.5 times on Intel's."""


def product(features: Tensor, weight: Tensor, bias: Tensor | None, *, few: int = 1) -> Tensor:
    """F.linear, within rounding, by oneDNN where that is faster.

    Args:
        features: (..., in).
        weight: (out, in).
        bias: (out,).
        few: Leave up to so many times `FEWEST_ROWS` rows to MKL.

    Returns:
        (..., out).
    """
    if not is_float32_on_cpu(features):  # first: compiled code would depend on the number of rows
        return F.linear(features, weight, bias)
    if features.shape[:-1].numel() < few * FEWEST_ROWS or features.numel() <= _FEWEST_VALUES:
        return F.linear(features, weight, bias)
    if _GRADIENT_BY_MKL and needs_gradient(weight):
        return _Product.apply(features, weight, bias)
    return _convolved(features, weight, bias)


def is_float32_on_cpu(features: Tensor) -> bool:
    """Whether there is a choice between oneDNN and MKL.

    In half precision F.linear is oneDNN's, and faster; a compiler would copy the features.
    """
    single = features.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    by_onednn = features.device.type == "cpu" and _HAS_ONEDNN
    return by_onednn and single and not torch.compiler.is_compiling()


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a backward pass would compute its gradient."""
    return tensor.requires_grad and torch.is_grad_enabled()


def _convolved(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    image = features.reshape(1, -1, 1, features.shape[-1]).permute(0, 3, 1, 2)
    # Dilating one pixel changes nothing; without it torch uses MKL on one thread.
    convolved = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return convolved.permute(0, 2, 3, 1).reshape(*features.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """A convolution of which MKL computes the weights' gradient.

    The backward pass computes it even where the images' gradient alone is wanted; freeze the
    weights there (`surgery.frozen`).
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
