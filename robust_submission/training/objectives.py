"""What a classifier's training step minimises: on images, on adversarial examples, on both."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks.base import Attack
from robust_submission.attacks.pgd import PGD
from robust_submission.models.classifier import reveal
from robust_submission.models.surgery import evaluating, frozen
from robust_submission.training.mixing import Mixing
from robust_submission.training.recipe import MixupConfig, ObjectiveConfig
from robust_submission.training.state import Chunk, Examples

FALL_BACK_STEPS = 4
"""Steps, of 2.5 epsilon / 4 each, of the attack that takes the place of one step that fails."""


def attack_revealed(
    attack: Attack, classifier: nn.Module, images: Tensor, labels: Tensor, seeds: Tensor
) -> Tensor:
    """Adversarial examples made through `reveal(classifier)`, in eval mode and with frozen weights.

    Both are restored. An attacker that GCM misleads would train the model against noise.

    Args:
        attack: Makes the examples.
        classifier: The bare classifier, not a parallel wrapper around it.
        images: (B, 3, H, W), float32, RGB, 0 to 1.
        labels: (B,), int64; or probabilities (B, num_classes) where the attack takes them.
        seeds: (B,), int64, of each image's random start.
    """
    with evaluating(classifier), frozen(classifier):
        return attack(reveal(classifier), images, labels, seeds=seeds)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy, on the images or on adversarial examples of them (Madry et al. 2018).

    With an attack of one step it is fast adversarial training (Wong et al. 2020).
    """

    attack: PGD | None = None
    """Makes the examples; None trains on the images themselves."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""

    def examples(self, classifier: nn.Module, chunk: Chunk) -> Examples:
        """Images (B, 3, H, W) and their targets."""
        images, targets, seeds = chunk
        if self.attack:
            images = attack_revealed(self.attack, classifier, images, targets, seeds)
        return images, targets

    def loss(self, model: nn.Module, examples: Examples) -> Tensor:
        """The mean cross-entropy of `model`."""
        images, targets = examples
        return F.cross_entropy(model(images).float(), targets, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Trades:
    """TRADES (Zhang et al. 2019): clean cross-entropy, and how far an attacker moves the output.

    CE(f(x), y) + beta * KL(f(x) || f(x')), where x' raises that divergence. For fixed f(x) its
    gradient at x' is that of the cross-entropy with the probabilities f(x) as labels, which the
    attack raises. It starts at a random point of the ball, where the authors' starts at normal
    noise of deviation 0.001: at x itself the gradient is zero. Clean and adversarial images go
    through the model as one batch, which batch normalisation, where there is any, sees together.
    """

    attack: PGD
    """Makes the adversarial examples."""
    beta: float = 6.0
    """Weight of the divergence."""
    label_smoothing: float = 0.0
    """Share of the target of the clean images spread evenly over all classes."""

    def examples(self, classifier: nn.Module, chunk: Chunk) -> Examples:
        """Clean images, then adversarial ones, (2 B, 3, H, W), and the labels (B,)."""
        images, labels, seeds = chunk
        with evaluating(classifier), torch.no_grad():
            probabilities = classifier(images).float().softmax(1)
        adversarial = attack_revealed(self.attack, classifier, images, probabilities, seeds)
        return torch.cat([images, adversarial]), labels

    def loss(self, model: nn.Module, examples: Examples) -> Tensor:
        """The mean over the B images."""
        images, labels = examples
        clean, adversarial = model(images).float().chunk(2)
        natural = F.cross_entropy(clean, labels, label_smoothing=self.label_smoothing)
        divergence = F.kl_div(
            adversarial.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True
        )
        return natural + self.beta * divergence


@dataclass(frozen=True, kw_only=True)
class MixedCrossEntropy:
    """Cross-entropy on images mixed by MixUp or CutMix, and on their two labels by their shares.

    Draws and pairs as those of `Challenge`.
    """

    mixing: Mixing
    """Draws the mixtures."""
    probability: float = 1.0
    """Share of images that are mixed."""
    label_smoothing: float = 0.0
    """Share of every target spread evenly over all classes."""

    def examples(self, classifier: nn.Module, chunk: Chunk) -> Examples:
        """Images (B, 3, H, W); then, (B,): label, label mixed in, and the share of the first.

        Raises:
            UserError: an odd number of images, which cannot be paired.
        """
        images, labels, seeds = chunk
        draws = self.mixing.draw(seeds).to(images.device)
        mixed, shares = self.mixing.either(images, draws, self.probability)
        return mixed, labels, self.mixing.partners(labels), shares

    def loss(self, model: nn.Module, examples: Examples) -> Tensor:
        """The mean."""
        images, own, other, shares = examples
        return mixed_cross_entropy(model(images), own, other, shares, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """The challenge's 2nd place: clean + MixUp + CutMix + FGSM cross-entropy, each of weight 1.

    Every draw is a function of the image's seed, and the pairs are neighbours in the global batch
    (see `training.mixing`): the same whatever the processes and the gradient accumulation. The four
    batches go through the model as one.
    """

    mixing: Mixing = field(default_factory=Mixing)
    """Draws the mixtures and the radii."""
    label_smoothing: float = 0.0
    """Share of every target spread evenly over all classes."""

    def examples(self, classifier: nn.Module, chunk: Chunk) -> Examples:
        """Clean, MixUp, CutMix and FGSM images (4 B, 3, H, W); then for each of them, (4 B,): its
        label, the label that is mixed in, and the share of its own.

        Raises:
            UserError: an odd number of images, which cannot be paired.
        """
        images, labels, seeds = chunk
        draws = self.mixing.draw(seeds).to(images.device)
        mixed, mixed_share = self.mixing.mixup(images, draws)
        cut, cut_share = self.mixing.cutmix(images, draws)
        with evaluating(classifier), frozen(classifier):
            attacked = self.mixing.fgsm(reveal(classifier), images, labels, draws)
        whole = torch.ones_like(mixed_share)
        shares = torch.cat([whole, mixed_share, cut_share, whole])
        partners = self.mixing.partners(labels)
        batch = torch.cat([images, mixed, cut, attacked])
        return batch, labels.repeat(4), partners.repeat(4), shares

    def loss(self, model: nn.Module, examples: Examples) -> Tensor:
        """The sum of the four means."""
        images, own, other, shares = examples
        return 4 * mixed_cross_entropy(model(images), own, other, shares, self.label_smoothing)


def mixed_cross_entropy(
    logits: Tensor, own: Tensor, other: Tensor, shares: Tensor, label_smoothing: float
) -> Tensor:
    """The mean cross-entropy of logits (B, num_classes) with two labels each, (B,), by share."""
    own_loss, other_loss = (
        F.cross_entropy(logits.float(), each, reduction="none", label_smoothing=label_smoothing)
        for each in (own, other)
    )
    return (shares * own_loss + (1 - shares) * other_loss).mean()


def build_objective(
    config: ObjectiveConfig, mixup: MixupConfig | None = None
) -> CrossEntropy | Trades | MixedCrossEntropy | Challenge:
    """The objective that a recipe asks for."""
    smoothing = config.label_smoothing
    attack = PGD(epsilon=config.epsilon, step_size=config.step_size, steps=config.steps)
    if config.name == "adversarial":
        return CrossEntropy(attack=attack, label_smoothing=smoothing)
    if config.name == "trades":
        return Trades(attack=attack, beta=config.beta, label_smoothing=smoothing)
    if config.name == "challenge":
        return Challenge(label_smoothing=smoothing)
    if mixup and mixup.mixes:
        mixing = Mixing(mixup_alpha=mixup.mixup_alpha, cutmix_alpha=mixup.cutmix_alpha)
        return MixedCrossEntropy(mixing=mixing, probability=mixup.prob, label_smoothing=smoothing)
    return CrossEntropy(label_smoothing=smoothing)


def build_fall_back(config: ObjectiveConfig) -> CrossEntropy | Trades | None:
    """The objective with several steps for one-step training that collapses; None for others."""
    objective = build_objective(config)
    if not config.attacks or config.steps > 1 or not config.fall_back:
        return None
    assert isinstance(objective, (CrossEntropy, Trades))
    return replace(objective, attack=PGD(epsilon=config.epsilon, steps=FALL_BACK_STEPS))


def validation_attack(config: ObjectiveConfig) -> PGD | None:
    """The attack that chooses the best epoch: ten steps, which one-step training can't fool.

    None for objectives that train against no one radius: clean accuracy then chooses.
    """
    if not config.attacks:
        return None
    return PGD(epsilon=config.epsilon, step_size=config.epsilon / 4, steps=10)
