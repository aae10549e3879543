"""Tensors with another gradient than their own, and the comparisons that decide when."""

from typing import Any

import torch
from torch import Tensor

STEEP = 100.0
"""How many times the slope of the values a derivative may be, or the slope the derivative."""
EQUAL = 1e-3
"""Largest difference, in units of the largest value, of tensors that count as the same."""
RELATED = 0.3
"""Smallest correlation of a tensor with what it stands for."""
SATURATED = 50.0
"""Difference of a softmax's two largest inputs from which on its gradient is lost in float32."""


class _Link(torch.autograd.Function):
    """One tensor's values with another's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, source: Tensor) -> Tensor:
        ctx.source = {"device": source.device, "dtype": source.dtype}
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].to(**ctx.source)


def linked(values: Tensor, source: Tensor) -> Tensor:
    """`values` with the gradient of `source`, a tensor of the same shape, perhaps elsewhere."""
    joined = _Link.apply(values.detach(), source)
    assert isinstance(joined, Tensor)
    return joined


def response(changes: Tensor, responses: Tensor) -> Tensor:
    """How a map from images to images passes on small changes, by least squares.

    It is taken as a filter with three colours in and out. A lossy codec drops high frequencies and
    keeps low ones, so that a change it passes on must be made of these.

    Args:
        changes: Of the images, (N, 3, H, W), float32.
        responses: Of what the map makes of them, the same.

    Returns:
        Complex (H, W // 2 + 1, 3, 3), as `filtered` takes it.
    """
    before, after = torch.fft.rfft2(changes), torch.fft.rfft2(responses)
    products = torch.einsum("nchw,ndhw->hwcd", after, before.conj())
    squares = torch.einsum("nchw,ndhw->hwcd", before, before.conj())
    unit = torch.eye(len(squares[0, 0]), dtype=squares.dtype, device=squares.device)
    squares = squares + 1e-3 * squares.abs().mean() * unit
    return torch.linalg.solve(squares, products, left=False)


def filtered(images: Tensor, passed: Tensor) -> Tensor:
    """Images (B, 3, H, W) as a map with this `response` would change them."""
    spectrum = torch.einsum("hwcd,ndhw->nchw", passed, torch.fft.rfft2(images))
    return torch.fft.irfft2(spectrum, s=images.shape[2:])


def sloped(output: Tensor, source: Tensor) -> Tensor:
    """Replace the derivative of images on which it is far from the slope of the values.

    Args:
        output: (B, ...), an operation's, with its own gradient.
        source: The operation's input, of the same shape.

    Returns:
        `output` itself where nothing is replaced.
    """
    (derivative,) = torch.autograd.grad(output.sum(), source, retain_graph=True)
    sizes = derivative.detach().flatten(1).abs().nan_to_num(torch.inf)
    inputs, values = (each.detach().flatten(1).double() for each in (source, output))
    slope = values.std(dim=1) / inputs.std(dim=1).clamp_min(1e-300)
    high = sizes.kthvalue(max(1, round(0.9 * sizes.shape[1])), dim=1).values
    flat = high * STEEP < slope
    wild = sizes.median(dim=1).values > STEEP * slope
    if not bool((flat | wild).any()):
        return output
    related = correlation(inputs, values)
    factor = torch.where(related.abs() > RELATED, slope * related.sign(), 0).to(output.dtype)
    shape = (-1, *[1] * (output.ndim - 1))
    straight = linked(output, source * factor.view(shape))
    return torch.where((flat | wild).view(shape), straight, output)


def unsaturated(output: Tensor, source: Tensor) -> Tensor:
    """Give a saturated softmax over the last dimension the gradient of a softer one.

    Returns:
        `output` itself where it is not saturated.
    """
    if source.shape[-1] < 2:
        return output
    top = source.detach().topk(2, dim=-1).values
    gap = top[..., :1] - top[..., 1:]
    if not bool((gap > SATURATED).any()):
        return output
    soft = (source / torch.where(gap > SATURATED, gap / 10, 1)).softmax(dim=-1)
    return linked(output, soft)


def in_order(raw: Tensor, outputs: Tensor) -> Tensor:
    """(B,) bool: whether the outputs never fall where `raw`, of the same shape, rises."""
    if raw.shape != outputs.shape:
        return torch.zeros(len(outputs), dtype=torch.bool, device=outputs.device)
    rising = outputs.detach().gather(1, raw.detach().argsort(dim=1)).diff(dim=1)
    slack = 1e-6 * outputs.detach().abs().amax(dim=1, keepdim=True)
    return (rising >= -slack).all(dim=1)


def is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors, whole batches, are equal but for a small part of the largest value."""
    if first.dtype == torch.bool:
        return torch.equal(first, second)
    scale = first.detach().abs().amax()
    return bool((first.detach() - second.detach()).abs().amax() <= EQUAL * scale)


def is_identity(output: Tensor, source: Tensor) -> bool:
    """Whether the gradient of one operation, added up, is about that of the identity."""
    (gradient,) = torch.autograd.grad(output.sum(), source, retain_graph=True)
    return bool((gradient - 1).abs().amax() < 0.1)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Of each row of (B, N): (B,), 0 where one is constant."""
    first, second = (each - each.mean(dim=1, keepdim=True) for each in (first, second))
    sizes = first.norm(dim=1) * second.norm(dim=1)
    return ((first * second).sum(dim=1) / sizes.clamp_min(1e-300)).nan_to_num()
