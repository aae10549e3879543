"""What a training step minimises."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from attacks.contract import Attack
from attacks.gradient import PGD
from models.classifier import reveal
from models.gradient_map import evaluating
from training.recipe import ObjectiveConfig


def attack_revealed(
    attack: Attack, classifier: nn.Module, images: Tensor, labels: Tensor, seeds: Tensor
) -> Tensor:
    """Adversarial examples made through `reveal(classifier)` in eval mode; its modes are restored.

    An attacker that GCM misleads would train the model against noise.

    Args:
        attack: Makes the examples.
        classifier: The bare classifier, not a parallel wrapper around it.
        images: (B, 3, H, W), float32, RGB, 0 to 1.
        labels: (B,), int64.
        seeds: (B,), int64, of each image's random start.
    """
    with evaluating(classifier):
        return attack(reveal(classifier), images, labels, seeds=seeds)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Cross-entropy, on the images or on adversarial examples of them (Madry et al. 2018)."""

    attack: PGD | None = None
    """Makes the examples; None trains on the images themselves."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""

    def __call__(
        self, model: nn.Module, classifier: nn.Module, batch: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """The mean loss.

        Args:
            model: What is trained: `classifier`, or a parallel wrapper around it.
            classifier: The bare classifier.
            batch: Images (B, 3, H, W); labels (B,) or probabilities (B, num_classes); seeds (B,).
        """
        images, targets, seeds = batch
        if self.attack:
            images = attack_revealed(self.attack, classifier, images, targets, seeds)
        logits = model(images).float()
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a recipe asks for."""
    attack = None
    if config.name == "adversarial":
        attack = PGD(epsilon=config.epsilon, step_size=config.step_size, steps=config.steps)
    return Objective(attack=attack, label_smoothing=config.label_smoothing)


def validation_attack(config: ObjectiveConfig) -> PGD | None:
    """The attack that chooses the best epoch: ten steps, which one-step training can't fool."""
    if config.name == "standard":
        return None
    return PGD(epsilon=config.epsilon, step_size=config.epsilon / 4, steps=10)
