"""Adversarial weight perturbation, AWP (Wu et al. 2020): a loss that is low around the weights.

Between the making of adversarial examples and their loss, each matrix of weights moves to where the
loss is larger; the gradient is taken there and the weights are put back before the update.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_submission.models.surgery import evaluating


@dataclass(frozen=True, kw_only=True)
class WeightPerturbation:
    """One step of ascent, of a size relative to each tensor's norm (Wu et al. 2020, equation 10).

    Weights of one dimension (biases, norms, layer scales) stay where they are, as in the paper. The
    ascent sees the classifier in eval mode: it draws nothing and leaves buffers alone. With
    gradient accumulation each chunk has a perturbation of its own.
    """

    gamma: float
    """Size of the perturbation, relative to the norm of each tensor of weights."""
    first_update: int = 0
    """The update of the weights from which on it is used."""

    @contextmanager
    def __call__(
        self,
        classifier: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        mean: Callable[[list[Tensor]], list[Tensor]],
    ) -> Iterator[None]:
        """Perturb the weights within the block; after it they are back bit for bit.

        Args:
            classifier: The bare classifier, not a parallel wrapper around it.
            loss: What to raise, of the classifier, in any scale.
            mean: Averages gradients over all processes, whose weights then stay the same.
        """
        weights = [each for each in classifier.parameters() if each.requires_grad and each.ndim > 1]
        with evaluating(classifier), torch.enable_grad():
            gradients = mean(list(torch.autograd.grad(loss(classifier), weights)))
        kept = [each.detach().clone() for each in weights]
        try:
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    gradient.nan_to_num_(0, 0, 0)  # what overflows in float16 does not move
                    length = gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
                    weight.add_(gradient * (self.gamma * weight.norm() / length))
            yield
        finally:
            with torch.no_grad():
                for weight, former in zip(weights, kept, strict=True):
                    weight.copy_(former)
