"""MixUp, CutMix, either of them, and FGSM of random radius, drawn image by image.

The images at 2 k and 2 k + 1 of a batch are a pair. The batch is in random order, so a pair is a
random one; and as long as processes and accumulation cut a global batch into even parts, it is the
same pair however many they are. Each image of a pair draws a mixture of its own from its seed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robust_submission.attacks.base import Model
from robust_submission.attacks.losses import cross_entropy
from robust_submission.attacks.pgd import input_gradient
from robust_submission.cli.errors import UserError


@dataclass(frozen=True)
class MixingDraws:
    """For each image of a batch, (B,) float32 from 0 to 1."""

    mixup: Tensor
    """Share of its own pixels in MixUp."""
    cutmix: Tensor
    """Share of its own pixels in CutMix, but for what the border cuts off."""
    centers: Tensor
    """(B, 2), the middle of CutMix's box, in heights and widths."""
    radius: Tensor
    """Of FGSM, from the smallest at 0 to the largest at 1."""
    chance: Tensor
    """Decides between MixUp, CutMix and neither."""

    def to(self, device: torch.device) -> "MixingDraws":
        """The draws on a device."""
        return MixingDraws(*(each.to(device) for each in vars(self).values()))


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """By default what the challenge's 2nd place mixed and attacked with."""

    mixup_alpha: float = 1.0
    """Beta(alpha, alpha) of the shares in MixUp (Zhang et al. 2018); 0: it mixes nothing."""
    cutmix_alpha: float = 1.0
    """The same in CutMix (Yun et al. 2019)."""
    smallest: float = 0.001
    """Smallest radius of FGSM in L-infinity, in pixel values from 0 to 1."""
    largest: float = 0.08
    """Largest radius of FGSM."""

    def draw(self, seeds: Tensor) -> MixingDraws:
        """The draws of images with these seeds (B,), int64, on the CPU."""
        rows = list[np.ndarray]()
        for seed in seeds.tolist():
            generator = np.random.default_rng(seed)
            alphas = (self.mixup_alpha, self.cutmix_alpha)
            shares = [generator.beta(alpha, alpha) if alpha else 1.0 for alpha in alphas]
            rows.append(np.concatenate([shares, generator.random(4)]))
        drawn = torch.from_numpy(np.stack(rows)).float()
        return MixingDraws(drawn[:, 0], drawn[:, 1], drawn[:, 2:4], drawn[:, 4], drawn[:, 5])

    def partners(self, values: Tensor) -> Tensor:
        """The values (B, ...) of each image's partner.

        Raises:
            UserError: an odd number of them.
        """
        if len(values) % 2:
            raise UserError(
                "expected a batch_size of which each process and each part of gradient_accumulation"
                f" gets an even number of images, received {len(values)}."
            )
        return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    def mixup(self, images: Tensor, draws: MixingDraws) -> tuple[Tensor, Tensor]:
        """MixUp of each image (B, 3, H, W) with its partner, and the share (B,) of its own."""
        share = draws.mixup.view(-1, 1, 1, 1)
        return share * images + (1 - share) * self.partners(images), draws.mixup

    def cutmix(self, images: Tensor, draws: MixingDraws) -> tuple[Tensor, Tensor]:
        """A box of its partner in each image (B, 3, H, W), and the share (B,) of its own pixels."""
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
        """MixUp or CutMix of each image (B, 3, H, W), or itself; the share (B,) of its own pixels.

        Args:
            images: RGB, 0 to 1.
            draws: Of these images.
            probability: Of being mixed; by both alike, or by the one whose alpha is above 0.
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
        """FGSM examples (Goodfellow et al. 2015), each image of a radius of its own.

        Args:
            model: Without gradient masking, in eval mode.
            images: (B, 3, H, W), float32, 0 to 1.
            labels: (B,), int64.
            draws: Of these images.
        """
        gradient, _ = input_gradient(model, images, labels, cross_entropy)
        radius = self.smallest + (self.largest - self.smallest) * draws.radius
        moved = images + radius.view(-1, 1, 1, 1) * gradient.nan_to_num().sign()
        return moved.clamp(0, 1)
