"""timm's Muon where a processor has to emulate bfloat16.

Muon's Newton-Schulz iteration (Keller Jordan 2024) is products of matrices, which timm computes in
bfloat16. A CPU without instructions for it takes them number by number: an AMD EPYC of Zen 3
thirty times as long as in float32, which it is given here.
"""

from functools import wraps
from typing import Any

import torch
from timm.optim import muon
from torch import Tensor
from torch.backends import mkldnn

EMULATES_BFLOAT16 = not (
    mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # no public name
)
_newton_schulz = muon.zeropower_via_newtonschulz


def avoid_emulated_bfloat16() -> None:
    """Have every Muon of this process compute in float32 on a CPU that emulates bfloat16."""
    muon.zeropower_via_newtonschulz = _orthogonalized


@wraps(_newton_schulz)
def _orthogonalized(update: Tensor, *arguments: Any, **options: Any) -> Tensor:
    if EMULATES_BFLOAT16 and update.device.type == "cpu":
        options["dtype"] = torch.float32
    return _newton_schulz(update, *arguments, **options)
