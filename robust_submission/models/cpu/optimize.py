"""Exchange the layers of a network for ones that a CPU computes in less time.

The weights, the names of the state and, within rounding, the results stay. On a GPU, in half
precision and when compiled the layers are torch's own. docs/results/cpu_kernels.md says what each
gains, `benchmarks/cpu_kernels.py` measures it.
"""

import timm
import torch
from torch import Tensor, nn

from robust_submission.models.cpu.convolutions import ProductConv2d
from robust_submission.models.cpu.products import product

_NEW_SIZE = 8
"""oneDNN prepares each new size of batch, a millisecond or two per layer, which pays off from this
many times the rows on."""


class ProductLinear(nn.Linear):
    """nn.Linear by oneDNN or MKL, whichever is faster."""

    few: int
    """See `products.product`."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias, few=self.few)

    def _get_name(self) -> str:
        return nn.Linear.__name__


class RowsGELU(nn.GELU):
    """nn.GELU of channels-last images as rows of pixels, which torch leaves to oneDNN.

    Of channels-last images as they are it does not (use_mkldnn in its Activation.cpp).
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(input)

    def _get_name(self) -> str:
        return nn.GELU.__name__


class RowsTimmGELU(RowsGELU):
    """The same for timm's GELU, which has no `approximate`."""

    approximate = "none"

    def extra_repr(self) -> str:
        return ""


_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ProductLinear,
    nn.Conv2d: ProductConv2d,
    nn.GELU: RowsGELU,
    timm.layers.GELU: RowsTimmGELU,
}


def optimize_for_cpu(module: nn.Module, *, channels_last: bool, one_size: bool = True) -> None:
    """Have the layers of `module` compute the way that is fastest on a CPU.

    Layers of a type derived from torch's or timm's are left alone.

    Args:
        module: Changed in place: the classes of its layers, and how its weights lie in memory.
        channels_last: Lay four-dimensional weights out channels-last; features then follow. For a
            CPU, not a GPU, and not where FSDP shards the weights, which must be contiguous.
        one_size: Whether all batches have one size, as those of attacks, which shrink, do not.
    """
    for layer in module.modules():
        if faster := _faster(layer):
            layer.__class__ = faster
        if isinstance(layer, ProductLinear):
            layer.few = 1 if one_size else _NEW_SIZE
    if channels_last:
        for weight in module.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _faster(layer: nn.Module) -> type[nn.Module] | None:
    if isinstance(layer, nn.Conv2d) and not ProductConv2d.suits(layer):
        return None
    return _FASTER.get(type(layer))


def original_type(layer: nn.Module) -> type[nn.Module]:
    """The type of a layer before `optimize_for_cpu`."""
    originals = {faster: kind for kind, faster in _FASTER.items()}
    return originals.get(type(layer), type(layer))
