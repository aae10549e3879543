"""Training a TRN: the images that it is attacked on, and its loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks import Attack, build_attack
from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier, undefended
from robust_submission.models.surgery import evaluating, frozen
from robust_submission.models.trn import TRN
from robust_submission.models.trn.gradient_map import gradient_map
from robust_submission.training.objectives.adversarial import attack_revealed
from robust_submission.training.recipe import RestorationConfig


def attack_unaware(
    attack: Attack, classifier: RobustClassifier, images: Tensor, labels: Tensor, seeds: Tensor
) -> Tensor:
    """Adversarial examples by an attacker who knows the classifier, but none of its defences.

    For the arguments see `attack_revealed`.
    """
    with evaluating(classifier), frozen(classifier):
        return attack(undefended(classifier), images, labels, seeds=seeds)


class RestorationLoss(nn.Module):
    """The loss as a module, so that a parallel wrapper computes all of it in one forward pass.

    It uses the classifier without its stages `conceal` and `randomize`, whose gradients would
    mislead the TRN. The gradient map is a constant of the loss, even where the classifier that it
    comes from is trained.

    Args:
        classifier: A classifier with a TRN as `restore`.
        config: The weights of the terms.

    Raises:
        UserError: There is a feature term, and the backbone has no `forward_features`.
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
        """Set training mode; a classifier that is not trained stays in eval mode."""
        super().train(mode)
        if not self.config.end_to_end:
            self.classifier.backbone.eval()
        return self

    def forward(self, images: Tensor, attacked: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of clean images and their attacked versions, (B, 3, H, W), and labels."""
        config = self.config
        restored = self.classifier.restored(attacked)
        loss = config.reconstruction * F.l1_loss(restored, images)
        if config.feature:
            features, logits = self._features(restored)
            with torch.no_grad(), evaluating(self.classifier.backbone):
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
        """KL divergence of the surrogate's logits plus 1 - cosine of its gradient maps."""
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
    """Attacks each image by one of several attacks, or by none, drawn with the image's seed; the
    loss compares the restored image with the clean one."""

    attacks: Sequence[Callable[[RobustClassifier, Tensor, Tensor, Tensor], Tensor]]
    """From the classifier, images, labels and seeds to attacked images."""
    weights: Sequence[float]
    """How often each attack is drawn, relative to the others."""
    clean: float
    """Share of images that are not attacked."""
    cache: dict[int, Tensor] | None = None
    """Attacked images by seed, to be reused; None to attack each time."""

    def examples(
        self, classifier: RobustClassifier, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> tuple[Tensor, ...]:
        """Clean images and attacked images, (B, 3, H, W) each, and labels, (B,)."""
        if self.cache is None:
            return images, self._attacked(classifier, images, labels, seeds), labels
        keys = seeds.tolist()
        new = torch.tensor([key not in self.cache for key in keys])
        if new.any():
            made = self._attacked(classifier, images[new], labels[new], seeds[new]).cpu()
            self.cache.update(zip(seeds[new].tolist(), made, strict=True))
        attacked = torch.stack([self.cache[key] for key in keys]).to(images.device)
        return images, attacked, labels

    def _attacked(
        self, classifier: RobustClassifier, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> Tensor:
        drawn = np.array([np.random.default_rng(seed).random() for seed in seeds.tolist()])
        shares = np.cumsum(self.weights) / np.sum(self.weights) * (1 - self.clean)
        choice = torch.from_numpy(np.searchsorted(shares, drawn, side="right"))
        attacked = images.clone()
        for place, attack in enumerate(self.attacks):
            rows = (choice == place).nonzero().squeeze(1)
            if len(rows):
                attacked[rows] = attack(classifier, images[rows], labels[rows], seeds[rows])
        return attacked

    def loss(self, model: nn.Module, examples: tuple[Tensor, ...]) -> Tensor:
        """The mean loss; `model` is `RestorationLoss`, or a parallel wrapper around it."""
        return model(*examples)


def build_restoration(config: RestorationConfig) -> RestorationObjective:
    """The objective of a recipe, with its attacks."""
    return RestorationObjective(
        attacks=[
            partial(
                attack_revealed if each.adaptive else attack_unaware,
                build_attack(each.name, each.epsilon, "linf", **each.options),
            )
            for each in config.attacks
        ],
        weights=[each.weight for each in config.attacks],
        clean=config.clean,
        cache={} if config.cache else None,
    )
