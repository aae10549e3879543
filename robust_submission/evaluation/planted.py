"""Adversarial examples that are known to exist, to measure how strong an attack is.

The active test of Zimmermann et al. 2022 (arXiv 2206.13991). For each image the model's last layer
is replaced by a binary one that calls the image and random points around it class 0, and some point
of the ball class 1. An attack that finds no such point is too weak to show that a model is robust.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks import NORMS, PGD, Attack, Model
from robust_submission.attacks.base import Draws
from robust_submission.attacks.losses import margin

INNER = 40
"""Random points inside the ball, of class 0."""
GRIDS = (4, 8, 16, 4, 8, 16, 4, 8, 16, 4, 8, 16, 4, 8, 16)
"""Points on the surface, where the search starts: signs drawn on grids of so many cells a side.
Features follow coarse patterns more than fine ones."""
SIDES = (0.35, 0.25, 0.18)
"""Sides of the squares that the search moves, in units of the image's."""
MOVES = 20
"""Moves with each of these sides."""
LONGER = 2
"""Steps of the PGD that plants, in units of those of the attack that is tested."""
HARDNESS = 0.9
"""Where the threshold lies, from what random points reach (0) to what was planted (1)."""
RIDGE = 0.1
"""What is added to the covariance's diagonal, in units of its mean."""
QUERIES = INNER + len(GRIDS) + MOVES * len(SIDES) + 10
"""Forward passes per image to plant without gradients and to score, at most."""


@dataclass(frozen=True)
class Readout:
    """The last layer of a model, from features (B, D) to outputs (B, num_classes)."""

    model: Model
    layer: nn.Module
    calls: int
    """How often a forward pass calls it; the last call makes the model's outputs."""

    def watch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's features (B, D) and outputs (B, num_classes), float64."""
        seen = list[tuple[Tensor, Tensor]]()
        with torch.no_grad(), self._at_last_call(lambda *both: seen.append(both)):
            self.model(images)
        features, outputs = (each.double().nan_to_num() for each in seen[-1])
        return features, outputs

    def replaced(self, head: Callable[[Tensor], Tensor]) -> Model:
        """The model with `head` in place of the layer."""

        def changed(images: Tensor) -> Tensor:
            with self._at_last_call(lambda features, _: head(features)):
                return self.model(images)

        return changed

    @contextmanager
    def _at_last_call(self, change: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
        calls = 0

        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor | None:
            nonlocal calls
            calls += 1
            return change(inputs[0], outputs) if calls % self.calls == 0 else None

        handle = self.layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def find_readout(model: Model, images: Tensor, num_classes: int) -> Readout | None:
    """Find the last layer; None if no layer alone decides the model's outputs.

    Args:
        model: What an attacker differentiates.
        images: A few to try it on, (B, 3, H, W).
        num_classes: Outputs of the model, and rows of the layer's weight.
    """
    if not isinstance(model, nn.Module):
        return None
    called = list[nn.Module]()

    def hook(layer: nn.Module, inputs: tuple[object, ...], outputs: object) -> None:
        given = [each.shape for each in (*inputs[:1], outputs) if isinstance(each, Tensor)]
        if [len(shape) for shape in given] == [2, 2] and given[1] == (len(images), num_classes):
            called.append(layer)

    handles = [
        layer.register_forward_hook(hook)
        for layer in model.modules()
        if isinstance(weight := getattr(layer, "weight", None), Tensor)
        and weight.ndim == 2
        and len(weight) == num_classes
        and not isinstance(layer, torch.jit.ScriptModule)  # which takes no hooks
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    if not called:
        return None
    readout = Readout(model, called[-1], called.count(called[-1]))
    return readout if _decides(readout, images) else None


def _decides(readout: Readout, images: Tensor) -> bool:
    """Whether the model calls every image what a binary head in place of the layer calls it."""

    def predictions(sign: int) -> Tensor:
        def head(features: Tensor) -> Tensor:
            logits = torch.ones(len(features), device=features.device) * sign
            return torch.stack([torch.zeros_like(logits), logits], dim=1)

        with torch.no_grad():
            outputs = readout.replaced(head)(images)
        return outputs if outputs.shape == (len(images), 2) else outputs.new_zeros(len(images), 2)

    try:
        low, high = predictions(-1), predictions(1)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the user's code, which may need every class: anything
        return False
    alike = all(torch.allclose(each, each[:1].expand_as(each), atol=1e-4) for each in (low, high))
    return alike and bool((low.argmax(dim=1) == 0).all() and (high.argmax(dim=1) == 1).all())


@dataclass(frozen=True, kw_only=True)
class Plants:
    """One binary last layer for each image of a batch."""

    weights: Tensor
    """(B, D), float64."""
    thresholds: Tensor
    """(B,), float64."""
    points: Tensor
    """(B, 3, H, W): points of the balls that are of class 1."""

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (B, 2), float32, of the features (B, D)."""
        logits = ((features.double() * self.weights).sum(dim=1) - self.thresholds).float()
        return torch.stack([torch.zeros_like(logits), logits], dim=1)


@dataclass(frozen=True, kw_only=True)
class Planter:
    """Plants an adversarial example in the ball around each image.

    A point is planted twice: by a search without gradients, and by PGD. What is kept of an image is
    the point that reaches more: the first where gradients mislead, where they do not the second,
    which weak attacks miss.
    """

    deployed: Readout
    """What a point reaches is measured on it."""
    seen: Readout
    """What PGD differentiates: the same layer of a model with the same features."""
    norm: str
    epsilon: float
    steps: int
    """Of the attack that is tested."""

    def plant(self, images: Tensor, seeds: Tensor) -> Plants:
        """Plant in each ball; where nothing exceeds the random points, the point is of class 0.

        Args:
            images: (B, 3, H, W).
            seeds: (B,), as attacks take them.
        """
        draws = Draws.choose(len(images), None, seeds, 0)
        norm = NORMS[self.norm]
        clean, outputs = self.deployed.watch(images)
        random = [norm.random_start(images, self.epsilon, draws) for _ in range(INNER)]
        inner = torch.stack([self._features(each) for each in random], dim=1)
        start, weights = self._farthest(images, inner, draws)
        known = torch.cat([clean[:, None], inner], dim=1)
        heights = (known * weights[:, None]).sum(dim=2)
        gaps = outputs.topk(2, dim=1).values.diff(dim=1).abs().squeeze(1)
        ground = _Ground(weights, heights[:, 0], heights.amax(dim=1), gaps.clamp_min(1e-3))
        plants = ground.plants(*self._climbed(images, start, weights, draws))
        return ground.plants(*self._pushed(images, plants, weights, seeds + 1))

    def _features(self, points: Tensor) -> Tensor:
        return self.deployed.watch(points)[0]

    def _farthest(self, images: Tensor, inner: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Points of the surface whose features lie far from those inside, (B, N, D), and the
        direction (B, D) to them."""
        center, norm = inner.mean(dim=1), NORMS[self.norm]
        best, farthest = images, torch.zeros_like(center)
        for cells in GRIDS:
            pattern = norm.direction(_signs_on_grid(images, cells, draws), images)
            points = norm.project(images + self.epsilon * pattern, images, self.epsilon)
            offsets = self._features(points) - center
            farther = offsets.norm(dim=1) > farthest.norm(dim=1)
            best = torch.where(farther[:, None, None, None], points, best)
            farthest = torch.where(farther[:, None], offsets, farthest)
        return best, _discriminant(inner - center[:, None], farthest)

    def _climbed(
        self, images: Tensor, points: Tensor, weights: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """Points that reach more, and what they reach, by moving random squares (after Square)."""
        norm, step = NORMS[self.norm], self.epsilon * (2 if self.norm == "linf" else 0.25)
        reached = (self._features(points) * weights).sum(dim=1)
        for side in SIDES:
            for _ in range(MOVES):
                square = norm.direction(_signed_square(images, side, draws), images)
                tried = norm.project(points + step * square, images, self.epsilon)
                heights = (self._features(tried) * weights).sum(dim=1)
                better = heights > reached
                points = torch.where(better[:, None, None, None], tried, points)
                reached = torch.where(better, heights, reached)
        return points, reached

    def _pushed(
        self, images: Tensor, plants: Plants, weights: Tensor, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same by PGD, where that reaches more."""
        attack = PGD(norm=self.norm, epsilon=self.epsilon, steps=LONGER * self.steps, loss=margin)
        zeros = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        tried = attack(self.seen.replaced(plants), images, zeros, seeds=seeds)
        both = [(self._features(each) * weights).sum(dim=1) for each in (plants.points, tried)]
        better = both[1] > both[0]
        points = torch.where(better[:, None, None, None], tried, plants.points)
        return points, torch.where(better, both[1], both[0])


@dataclass(frozen=True)
class PlantedTest:
    """Plants examples and has attacks look for them."""

    planter: Planter
    attacks: Mapping[str, tuple[Readout, Attack]]
    """By name, each with what it differentiates."""

    @property
    def names(self) -> list[str]:
        """The columns of `run`."""
        return ["planted", "random", *self.attacks]

    def run(self, images: Tensor, seeds: Tensor) -> Tensor:
        """bool (B, columns), on the CPU: whether there is an example in the ball of each image, and
        whether random points and each attack find one, by the model as it is deployed.

        Args:
            images: (B, 3, H, W).
            seeds: (B,), as attacks take them.
        """
        planter = self.planter
        plants = planter.plant(images, seeds)
        scored = planter.deployed.replaced(plants)

        def found(points: Tensor) -> Tensor:
            with torch.no_grad():
                return scored(points).argmax(dim=1).cpu() == 1

        columns = [found(plants.points) & ~found(images)]
        draws, norm = Draws.choose(len(images), None, seeds + 2, 0), NORMS[planter.norm]
        points = (norm.random_start(images, planter.epsilon, draws) for _ in range(planter.steps))
        columns.append(torch.stack([found(each) for each in points]).any(dim=0))
        zeros = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        for seen, attack in self.attacks.values():
            columns.append(found(attack(seen.replaced(plants), images, zeros, seeds=seeds + 3)))
        return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class _Ground:
    """What is known of each image before planting: everything (B,), but for the weights (B, D)."""

    weights: Tensor
    clean: Tensor
    """What the image itself reaches."""
    random: Tensor
    """The most that random points or the image reach."""
    gaps: Tensor
    """Difference of the two largest outputs at the image."""

    def plants(self, points: Tensor, reached: Tensor) -> Plants:
        """The image gets the logits' difference that it had from the layer that is replaced."""
        thresholds = self.random + HARDNESS * (reached - self.random).clamp_min(0)
        height = thresholds - self.clean
        scale = self.gaps / height.clamp_min(1e-12 * self.gaps)
        return Plants(
            weights=self.weights * scale[:, None], thresholds=thresholds * scale, points=points
        )


def _discriminant(inner: Tensor, offsets: Tensor) -> Tensor:
    """Fisher's direction, of length 1: offsets (B, D) over the covariance of `inner` (B, N, D)."""
    count = inner.shape[1]
    ridge = RIDGE * inner.square().sum(dim=(1, 2)) / inner.shape[2]
    ridge = ridge.clamp_min(1e-30)[:, None, None]
    gram = inner @ inner.mT + ridge * torch.eye(count, dtype=inner.dtype, device=inner.device)
    inside = torch.linalg.solve(gram, inner @ offsets[:, :, None])  # Woodbury: N by N, not D by D
    return F.normalize((offsets[:, :, None] - inner.mT @ inside).squeeze(2), dim=1)


def _signs_on_grid(images: Tensor, cells: int, draws: Draws) -> Tensor:
    """Signs (B, 3, H, W) that are equal within each of cells x cells rectangles."""
    cells = min(cells, *images.shape[2:])
    signs = (draws.uniform(images[:, :, :cells, :cells]) - 0.5).sign()
    return F.interpolate(signs, size=images.shape[2:], mode="nearest")


def _signed_square(images: Tensor, share: float, draws: Draws) -> Tensor:
    """One sign per channel in a square, `share` of the image wide, at a random place; else 0."""
    numbers = draws.uniform(images.new_empty(len(images), 1, 1, 2 + images.shape[1])).flatten(1)
    size = images.shape[-1]
    side = max(1, round(share * size))
    first = (numbers[:, :2] * (size - side + 1)).floor()[:, :, None]  # (B, 2, 1)
    pixels = torch.arange(size, device=images.device)
    rows, columns = ((pixels >= first) & (pixels < first + side)).unbind(1)  # (B, size) each
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return (numbers[:, 2:] - 0.5).sign()[:, :, None, None] * inside
