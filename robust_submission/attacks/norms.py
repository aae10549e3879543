"""The balls around an image, each with what one attack loop needs of it.

`direction` is the step of size one that increases a linear loss most; `project` brings a point into
the ball around the clean image and into the box 0 to 1; `random_start` draws uniformly from the
ball, then projects.

What is exact: the Linf and L1 projections give the nearest point of ball and box together. The L2
projection gives the nearest point of the ball, then clips, as foolbox and AutoAttack do. The result
is inside both (the clean image lies in the box, so that clipping only shortens the perturbation),
but not always the nearest such point. "Inside" holds up to the rounding of float32 pixels, 6e-8
each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robust_submission.attacks.base import Draws


class Norm(Protocol):
    """One ball: its size, steepest step, projection and random draw; images are (B, 3, H, W)."""

    def size(self, perturbation: Tensor) -> Tensor:
        """The norm of each image's perturbation: (B,)."""
        ...

    def direction(self, gradient: Tensor, images: Tensor) -> Tensor:
        """A step of size one, or 0 where the gradient is 0; independent of the gradient's scale."""
        ...

    def project(self, adversarial: Tensor, images: Tensor, epsilon: float | Tensor) -> Tensor:
        """The point of the ball around `images`, and of 0 to 1, that stands for `adversarial`.

        `epsilon` is one radius, or one per image, (B,).
        """
        ...

    def random_start(self, images: Tensor, epsilon: float, draws: Draws) -> Tensor:
        """A point drawn uniformly from the ball, clipped to 0 to 1."""
        ...


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def rescaled(gradient: Tensor) -> Tensor:
    """The gradient with its largest entry at 1, so that its squares neither overflow nor vanish."""
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    return gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)


def _unit(gradient: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient at size one; where it is 0 it stays 0."""
    gradient = rescaled(gradient)
    return gradient / _per_image(size(gradient)).clamp_min(1)


class Linf:
    """No pixel moves by more than epsilon."""

    def size(self, perturbation: Tensor) -> Tensor:
        return perturbation.flatten(1).abs().amax(dim=1)

    def direction(self, gradient: Tensor, images: Tensor) -> Tensor:
        return gradient.sign()

    def project(self, adversarial: Tensor, images: Tensor, epsilon: float | Tensor) -> Tensor:
        if isinstance(epsilon, Tensor):
            epsilon = _per_image(epsilon)
        return torch.clamp(adversarial, images - epsilon, images + epsilon).clamp_(0, 1)

    def random_start(self, images: Tensor, epsilon: float, draws: Draws) -> Tensor:
        return self.project(images + epsilon * (2 * draws.uniform(images) - 1), images, epsilon)


class L2:
    """The perturbation's Euclidean length, over all pixels and channels, is at most epsilon."""

    def size(self, perturbation: Tensor) -> Tensor:
        return perturbation.flatten(1).norm(dim=1)

    def direction(self, gradient: Tensor, images: Tensor) -> Tensor:
        return _unit(gradient, self.size)

    def project(self, adversarial: Tensor, images: Tensor, epsilon: float | Tensor) -> Tensor:
        perturbation = adversarial - images
        shrink = (epsilon / self.size(perturbation)).clamp(max=1)  # epsilon / 0 is infinite
        return (images + perturbation * _per_image(shrink)).clamp_(0, 1)

    def random_start(self, images: Tensor, epsilon: float, draws: Draws) -> Tensor:
        directions = draws.normal(images)
        directions = directions / _per_image(self.size(directions))
        dimensions = images[0].numel()
        radii = draws.uniform(images[:, :1, :1, :1]) ** (1 / dimensions)
        return self.project(images + epsilon * radii * directions, images, epsilon)


@dataclass(frozen=True)
class L1:
    """The perturbation's absolute values sum, over all pixels and channels, to at most epsilon."""

    density: float | None = 0.01
    """Share of the values that one step moves, all by the same amount: SLIDE (Tramèr & Boneh 2019,
    from the 99th percentile up). The steepest step moves a single value and needs thousands of
    steps. None moves all values in proportion to the gradient, as foolbox's L1 PGD does. Which one
    the GCM paper's "PGD L1" used is not published."""

    def size(self, perturbation: Tensor) -> Tensor:
        return perturbation.flatten(1).abs().sum(dim=1)

    def direction(self, gradient: Tensor, images: Tensor) -> Tensor:
        if self.density is None:
            return _unit(gradient, self.size)
        # A value already at its bound cannot move further: the others get its share.
        blocked = ((images <= 0) & (gradient < 0)) | ((images >= 1) & (gradient > 0))
        gradient = gradient.masked_fill(blocked, 0).flatten(1)
        count = max(1, round(self.density * gradient.shape[1]))
        steepest = gradient.abs().topk(count, dim=1).indices  # (B, count)
        signs = gradient.gather(1, steepest).sign()
        signs = signs / signs.abs().sum(dim=1, keepdim=True).clamp_min(1)
        return torch.zeros_like(gradient).scatter_(1, steepest, signs).view_as(images)

    def project(self, adversarial: Tensor, images: Tensor, epsilon: float | Tensor) -> Tensor:
        """The nearest point of ball and box together, by sorting.

        With d the perturbation and `room` the distance to the box's wall, the nearest point moves
        by min(room, max(|d| - t, 0)) = max(|d| - t, 0) - max(|d| - room - t, 0), where t is the
        smallest t >= 0 for which the moves sum to at most epsilon. That sum falls piecewise
        linearly in t, with corners at |d| and |d| - room (Croce & Hein 2021; without the walls,
        Duchi et al. 2008).
        """
        if isinstance(epsilon, Tensor):
            epsilon = epsilon.unsqueeze(1)
        perturbation = adversarial - images
        room = torch.where(perturbation > 0, 1 - images, images).flatten(1)
        moved = perturbation.abs().flatten(1)
        corners, order = torch.cat([moved, moved - room], dim=1).sort(dim=1, descending=True)
        slopes = torch.where(order < moved.shape[1], 1.0, -1.0)
        slope = slopes.cumsum(dim=1)
        total = (slopes * corners).cumsum(dim=1)
        # At t = corner k the row sums to total - corner * slope: find the last one inside the ball.
        inside = (total - corners * slope < epsilon).sum(dim=1, keepdim=True)
        last = (inside - 1).clamp_min(0)
        threshold = (total.gather(1, last) - epsilon) / slope.gather(1, last).clamp_min(1)
        moved = torch.minimum(room, (moved - threshold.clamp_min(0)).clamp_min(0))
        shrink = (epsilon / moved.sum(dim=1, keepdim=True)).clamp(max=1)  # undoes rounding
        return (images + perturbation.sign() * (moved * shrink).view_as(images)).clamp_(0, 1)

    def random_start(self, images: Tensor, epsilon: float, draws: Draws) -> Tensor:
        # Laplace draws over their sum plus one more exponential are uniform in the L1 ball
        # (Barthe et al. 2005).
        signed = 2 * draws.uniform(images) - 1
        laplace = -torch.log1p(-signed.abs().clamp(max=1 - 1e-7)) * signed.sign()
        extra = -torch.log1p(-draws.uniform(images[:, :1, :1, :1]))
        start = laplace / (_per_image(self.size(laplace)) + extra)
        return self.project(images + epsilon * start, images, epsilon)


NORMS: dict[str, Norm] = {"linf": Linf(), "l2": L2(), "l1": L1(), "l1-dense": L1(density=None)}
