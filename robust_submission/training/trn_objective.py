"""What a TRN's training step minimises."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks.base import Attack
from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier, undefended
from robust_submission.models.surgery import evaluating, frozen
from robust_submission.models.trn import TRN
from robust_submission.models.trn.gradient_map import gradient_map
from robust_submission.training.state import Chunk, Examples
from robust_submission.training.trn_recipe import RestorationConfig


def attack_unaware(
    attack: Attack, classifier: RobustClassifier, images: Tensor, labels: Tensor, seeds: Tensor
) -> Tensor:
    """Adversarial examples of an attacker who has the classifier and knows of no defence.

    Args: as `training.objectives.attack_revealed`.
    """
    with evaluating(classifier), frozen(classifier):
        return attack(undefended(classifier), images, labels, seeds=seeds)


@dataclass(frozen=True, kw_only=True)
class AttackMixture:
    """For each image one of several attacks, or none, drawn with the image's seed.

    Args:
        attacks: The attacks.
        weights: How often each is drawn, relative to the others.
        clean: Share of images that come back as they are.
        cache: Keep what was made, by seed, and give it again; None for no.
    """

    attacks: Sequence[Attack]
    weights: Sequence[float]
    clean: float
    cache: dict[int, Tensor] | None = None

    def __call__(
        self, classifier: RobustClassifier, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> Tensor:
        """Attacked images (B, 3, H, W); the arguments are those of `attack_unaware`."""
        if self.cache is None:
            return self._make(classifier, images, labels, seeds)
        keys = seeds.tolist()
        new = torch.tensor([key not in self.cache for key in keys])
        if new.any():
            made = self._make(classifier, images[new], labels[new], seeds[new]).cpu()
            fresh = [key for key in keys if key not in self.cache]
            self.cache.update(zip(fresh, made, strict=True))
        return torch.stack([self.cache[key] for key in keys]).to(images.device)

    def _make(
        self, classifier: RobustClassifier, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> Tensor:
        drawn = np.array([np.random.default_rng(seed).random() for seed in seeds.tolist()])
        shares = np.cumsum(self.weights) / np.sum(self.weights) * (1 - self.clean)
        choice = torch.from_numpy(np.searchsorted(shares, drawn, side="right"))
        attacked = images.clone()
        for place, attack in enumerate(self.attacks):
            rows = (choice == place).nonzero().squeeze(1)
            if len(rows):
                chosen = (images[rows], labels[rows], seeds[rows])
                attacked[rows] = attack_unaware(attack, classifier, *chosen)
        return attacked


class RestorationLoss(nn.Module):
    """The loss as a module, so that one forward pass of a parallel wrapper makes all of it.

    The classifier is seen without its concealing and randomizing stages, whose gradients would
    mislead the TRN.

    Args:
        classifier: With a TRN as `restore`.
        config: The weights.

    Raises:
        UserError: a feature term for a backbone without `forward_features`.
    """

    def __init__(self, classifier: RobustClassifier, config: RestorationConfig) -> None:
        super().__init__()
        if config.feature and not hasattr(classifier.backbone, "forward_features"):
            raise UserError(
                "objective.feature: expected a timm backbone with forward_features, "
                f"found {type(classifier.backbone).__name__}."
            )
        self.classifier = classifier
        self.config = config

    def train(self, mode: bool = True) -> "RestorationLoss":
        """Training mode; a classifier that is not trained along stays in eval mode."""
        super().train(mode)
        if not self.config.end_to_end:
            self.classifier.backbone.eval()
        return self

    def forward(self, images: Tensor, attacked: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of clean images, their attacked versions and labels."""
        config = self.config
        restored = self.classifier.restored(attacked)
        loss = config.reconstruction * F.l1_loss(restored, images)
        if config.feature:
            features, logits = self._features(restored)
            with torch.no_grad():
                wanted, _ = self._features(images)
            difference = F.l1_loss(features.float(), wanted.float())
            loss = loss + config.feature * difference / wanted.float().abs().mean()
            loss = loss + config.cross_entropy * F.cross_entropy(logits.float(), labels)
        elif config.cross_entropy:
            logits = self.classifier.classify(restored)
            loss = loss + config.cross_entropy * F.cross_entropy(logits.float(), labels)
        trn = self.classifier.restore
        if isinstance(trn, TRN) and trn.surrogate and config.distillation:
            loss = loss + config.distillation * self._distillation(trn, attacked)
        return loss

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Last features and logits of a timm backbone."""
        backbone = self.classifier.backbone
        features = backbone.forward_features(self.classifier.normalize(images))  # pyright: ignore[reportCallIssue]
        return features, backbone.forward_head(features)  # pyright: ignore[reportCallIssue]

    def _distillation(self, trn: TRN, images: Tensor) -> Tensor:
        """Divergence of the surrogate's logits, and one less the cosine of its gradient maps."""
        assert trn.surrogate is not None
        found, logits = trn.surrogate.gradient_map(images, trn.estimator, trn.top_k)
        backbone = self.classifier.backbone
        with torch.no_grad(), evaluating(backbone), frozen(backbone):
            classify = self.classifier.classify
            wanted = gradient_map(images, classify, trn.estimator, trn.top_k)
            targets = classify(images).float().softmax(1)
        divergence = F.kl_div(logits.log_softmax(1), targets, reduction="batchmean")
        cosine = F.cosine_similarity(found.flatten(1), wanted.flatten(1))
        return divergence + (1 - cosine).mean()


@dataclass(frozen=True, kw_only=True)
class RestorationObjective:
    """Attack, restore, compare."""

    mixture: AttackMixture

    def examples(self, classifier: RobustClassifier, chunk: Chunk) -> Examples:
        """Images, attacked images (both (B, 3, H, W)) and labels (B,)."""
        images, labels, seeds = chunk
        return images, self.mixture(classifier, images, labels, seeds), labels

    def loss(self, model: nn.Module, examples: Examples) -> Tensor:
        """The mean loss; `model` is `RestorationLoss`, or a parallel wrapper around it."""
        return model(*examples)


def build_mixture(config: RestorationConfig) -> AttackMixture:
    """The attacks of a recipe."""
    return AttackMixture(
        attacks=[each.build() for each in config.attacks],
        weights=[each.weight for each in config.attacks],
        clean=config.clean,
        cache={} if config.cache else None,
    )
