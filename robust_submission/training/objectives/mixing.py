"""MixUp, CutMix and FGSM of random radius, drawn per image, and the objectives that use them.

The images at 2k and 2k + 1 of a batch are a pair. The batch is in random order, so the pairs are
random; and as long as processes and gradient accumulation cut a global batch into even shares, the
pairs are the same whatever their number. Each image of a pair draws its own mixture from its seed.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks import Model, input_gradient
from robust_submission.attacks.losses import cross_entropy
from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import reveal
from robust_submission.models.surgery import evaluating, frozen


@dataclass(frozen=True)
class MixingDraws:
    """Random numbers per image of a batch: (B,) float32, 0 to 1, if not said otherwise."""

    mixup: Tensor
    """Share of its own pixels in MixUp."""
    cutmix: Tensor
    """Share of its own pixels in CutMix, before the box is cut at the border."""
    centers: Tensor
    """(B, 2), the centre of CutMix's box, as shares of height and width."""
    radius: Tensor
    """Radius of FGSM: 0 is the smallest, 1 the largest."""
    chance: Tensor
    """Chooses between MixUp, CutMix and neither."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixes and attacks images (B, 3, H, W), float32, RGB, 0 to 1, by their draws.

    The defaults are the challenge's 2nd place's.
    """

    mixup_alpha: float = 1.0
    """Shares in MixUp are from Beta(alpha, alpha) (Zhang et al. 2018); 0 mixes nothing."""
    cutmix_alpha: float = 1.0
    """The same for CutMix (Yun et al. 2019)."""
    smallest: float = 0.001
    """Smallest radius of FGSM in L-infinity, in pixel values from 0 to 1."""
    largest: float = 0.08
    """Largest radius of FGSM."""

    def draw(self, seeds: Tensor, device: torch.device | str = "cpu") -> MixingDraws:
        """Draw for images with these seeds, (B,), int64."""
        rows = list[np.ndarray]()
        for seed in seeds.tolist():
            generator = np.random.default_rng(seed)
            alphas = (self.mixup_alpha, self.cutmix_alpha)
            shares = [generator.beta(alpha, alpha) if alpha else 1.0 for alpha in alphas]
            rows.append(np.concatenate([shares, generator.random(4)]))
        drawn = torch.from_numpy(np.stack(rows)).float().to(device)
        return MixingDraws(drawn[:, 0], drawn[:, 1], drawn[:, 2:4], drawn[:, 4], drawn[:, 5])

    def partners(self, values: Tensor) -> Tensor:
        """The values (B, ...) of each image's partner.

        Raises:
            UserError: The number of images is odd.
        """
        if len(values) % 2:
            raise UserError(
                "batch_size: expected an even number of images per process and part of "
                f"gradient_accumulation, found {len(values)}."
            )
        return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    def mixup(self, images: Tensor, draws: MixingDraws) -> tuple[Tensor, Tensor]:
        """MixUp of each image with its partner, (B, 3, H, W), and the image's own share, (B,)."""
        share = draws.mixup.view(-1, 1, 1, 1)
        return share * images + (1 - share) * self.partners(images), draws.mixup

    def cutmix(self, images: Tensor, draws: MixingDraws) -> tuple[Tensor, Tensor]:
        """A box of the partner in each image, (B, 3, H, W), and the image's own share, (B,)."""
        inside = torch.ones(len(images), 1, 1, dtype=torch.bool, device=images.device)
        for axis, size in enumerate(images.shape[2:]):
            middle = (draws.centers[:, axis] * size).floor()
            half = ((1 - draws.cutmix).sqrt() * size).floor().div(2, rounding_mode="floor")
            places = torch.arange(size, device=images.device)
            near = (places >= (middle - half)[:, None]) & (places < (middle + half)[:, None])
            inside = inside & near.unsqueeze(2 - axis)  # (B, H, 1), then (B, 1, W)
        share = 1 - inside.float().mean((1, 2))
        return torch.where(inside.unsqueeze(1), self.partners(images), images), share

    def either(
        self, images: Tensor, draws: MixingDraws, probability: float
    ) -> tuple[Tensor, Tensor]:
        """MixUp, CutMix or neither per image, (B, 3, H, W), and the image's own share, (B,).

        An image is mixed with this probability: by MixUp and CutMix equally often, or by the one
        whose alpha is above 0.
        """
        mixed, mixed_share = self.mixup(images, draws)
        cut, cut_share = self.cutmix(images, draws)
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        mixup_part = 0.5 if both else float(self.mixup_alpha > 0)
        by_mixup = draws.chance < mixup_part * probability
        by_cutmix = ~by_mixup & (draws.chance < probability)
        share = torch.where(by_mixup, mixed_share, cut_share.where(by_cutmix, 1.0))
        by_mixup, by_cutmix = (each.view(-1, 1, 1, 1) for each in (by_mixup, by_cutmix))
        return torch.where(by_mixup, mixed, cut.where(by_cutmix, images)), share

    def fgsm(self, model: Model, images: Tensor, labels: Tensor, draws: MixingDraws) -> Tensor:
        """FGSM examples (Goodfellow et al. 2015) with a random radius per image, (B, 3, H, W).

        The model has no gradient masking and is in eval mode.
        """
        gradient, _ = input_gradient(model, images, labels, cross_entropy)
        radius = self.smallest + (self.largest - self.smallest) * draws.radius
        moved = images + radius.view(-1, 1, 1, 1) * gradient.nan_to_num().sign()
        return moved.clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class MixedCrossEntropy:
    """Cross-entropy on images mixed by MixUp or CutMix, both labels weighted by their share."""

    mixing: Mixing
    """Draws the mixtures."""
    probability: float = 1.0
    """Share of images that are mixed."""
    label_smoothing: float = 0.0
    """Share of every target spread evenly over all classes."""

    def examples(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> tuple[Tensor, ...]:
        """Mixed images (B, 3, H, W); labels, the partners' labels, and the own shares, (B,) each.

        Raises:
            UserError: The number of images is odd.
        """
        draws = self.mixing.draw(seeds, images.device)
        mixed, shares = self.mixing.either(images, draws, self.probability)
        return mixed, labels, self.mixing.partners(labels), shares

    def loss(self, model: nn.Module, examples: tuple[Tensor, ...]) -> Tensor:
        """The mean."""
        return mixed_cross_entropy(model, examples, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """Objective of the challenge's 2nd place: clean + MixUp + CutMix + FGSM cross-entropy.

    Each has weight 1. The four batches go through the model as one.
    """

    mixing: Mixing = field(default_factory=Mixing)
    """Draws the mixtures and the radii."""
    label_smoothing: float = 0.0
    """Share of every target spread evenly over all classes."""

    def examples(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> tuple[Tensor, ...]:
        """Clean, MixUp, CutMix and FGSM images, (4B, 3, H, W); for each the label, the partner's
        label, and the own share, (4B,).

        Raises:
            UserError: The number of images is odd.
        """
        draws = self.mixing.draw(seeds, images.device)
        mixed, mixed_share = self.mixing.mixup(images, draws)
        cut, cut_share = self.mixing.cutmix(images, draws)
        with evaluating(classifier), frozen(classifier):
            attacked = self.mixing.fgsm(reveal(classifier), images, labels, draws)
        whole = torch.ones_like(mixed_share)
        shares = torch.cat([whole, mixed_share, cut_share, whole])
        partners = self.mixing.partners(labels)
        batch = torch.cat([images, mixed, cut, attacked])
        return batch, labels.repeat(4), partners.repeat(4), shares

    def loss(self, model: nn.Module, examples: tuple[Tensor, ...]) -> Tensor:
        """The sum of the four means."""
        return 4 * mixed_cross_entropy(model, examples, self.label_smoothing)


def mixed_cross_entropy(
    model: nn.Module, examples: tuple[Tensor, ...], label_smoothing: float
) -> Tensor:
    """Mean cross-entropy on images with two labels each, of which the own has the weight `shares`.

    Args:
        model: From images to logits (B, num_classes).
        examples: Images (B, 3, H, W), own and other labels, (B,), int64, and shares, (B,), 0 to 1.
        label_smoothing: Share of every target spread evenly over all classes.
    """
    images, own, other, shares = examples
    logits = model(images)
    own_loss, other_loss = (
        F.cross_entropy(logits.float(), each, reduction="none", label_smoothing=label_smoothing)
        for each in (own, other)
    )
    return (shares * own_loss + (1 - shares) * other_loss).mean()
