"""The gradient map: how sensitive a classifier's loss is to each pixel, without the label.

TRN (arXiv 2202.01117) restores an image from the image and its gradient map, and names a Gradient
Map Estimation Mechanism for test time, when the label is unknown. The estimator is not published;
the three here are our readings of the idea. Each is the gradient of a loss that needs no label,
written as weights on the logits, whose vector-Jacobian product is the map. The loss itself is never
computed, so that a classifier of saturated probabilities still gives an exact direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Estimator = Literal["predicted", "expected", "average"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


def logit_weights(logits: Tensor, estimator: Estimator, top_k: int | None = None) -> Tensor:
    """The gradient of a label-free loss with respect to the logits, up to a positive factor.

    predicted: cross-entropy with the predicted label, the choice of most attacks on unlabelled
        images. Its gradient, softmax - onehot, vanishes as the classifier becomes confident;
        divided by the probability of all other classes it is softmax over the others - onehot,
        and does not.
    expected: the expectation of cross-entropy over the predicted probabilities, which is their
        entropy. (The expectation of the *gradients* would be zero for every image.)
    average: the average of cross-entropy over the `top_k` most likely classes, or over all.

    Args:
        logits: (B, num_classes), floating point; two classes at least.
        estimator: Which loss.
        top_k: Classes that "average" averages over; None for all.

    Returns:
        (B, num_classes) of the logits' type. Differentiable, but for the choice of classes.
    """
    exact = logits.double()
    if estimator == "predicted":
        label = F.one_hot(exact.argmax(1), exact.shape[1])
        weights = exact.masked_fill(label.bool(), -torch.inf).softmax(1) - label
    elif estimator == "expected":
        log_probabilities = exact.log_softmax(1)
        probabilities = log_probabilities.exp()
        entropy = -(probabilities * log_probabilities).sum(1, keepdim=True)
        weights = -probabilities * (log_probabilities + entropy)
        weights = weights / weights.abs().amax(1, keepdim=True).clamp_min(1e-300)
    else:
        count = min(top_k or exact.shape[1], exact.shape[1])
        likely = torch.zeros_like(exact).scatter(1, exact.topk(count, dim=1).indices, 1 / count)
        weights = exact.softmax(1) - likely
    return weights.to(logits.dtype)


def normalized(gradient: Tensor) -> Tensor:
    """Scale each image's gradient, (B, C, H, W), to a root mean square of 1; zeros stay zeros.

    The magnitude of a gradient varies with the classifier's confidence over tens of orders of
    magnitude; what a network can use is its pattern.
    """
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    gradient = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return gradient * gradient.pow(2).mean((1, 2, 3), keepdim=True).clamp_min(1e-12).rsqrt()


def gradient_map(
    images: Tensor,
    classify: Callable[[Tensor], Tensor],
    estimator: Estimator,
    top_k: int | None = None,
    *,
    differentiable: bool = False,
) -> Tensor:
    """The gradient map of each image, by autograd.

    Works under `torch.no_grad`, `torch.inference_mode` and autocast (computed in float32, where
    small gradients do not underflow), and accumulates nothing into any parameter's `.grad`.

    Args:
        images: (B, C, H, W), floating point, 0 to 1.
        classify: Images to logits, without gradient masking; in eval mode.
        estimator: See `logit_weights`.
        top_k: See `logit_weights`.
        differentiable: Keep the graph, so that the map can itself be differentiated with respect
            to the images; without effect where gradients are switched off.

    Returns:
        (B, C, H, W), float32 (float64 for float64), see `normalized`.
    """
    keep_graph = differentiable and torch.is_grad_enabled()
    autocast_off = torch.autocast(images.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast_off:
        pixels = images.to(torch.promote_types(images.dtype, torch.float32))
        if not (keep_graph and pixels.requires_grad):
            pixels = (pixels.clone() if pixels.is_inference() else pixels.detach()).requires_grad_()
        logits = classify(pixels)
        weights = logit_weights(logits if keep_graph else logits.detach(), estimator, top_k)
        (gradient,) = torch.autograd.grad(logits, pixels, weights, create_graph=keep_graph)
        return normalized(gradient)
