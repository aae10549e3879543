"""What a classifier's training minimises, plain or robust, and the attacks that belong to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks import PGD, Attack
from robust_submission.attacks.losses import cross_entropy
from robust_submission.models.classifier import reveal
from robust_submission.models.surgery import evaluating, frozen
from robust_submission.training.objectives.mixing import Challenge, MixedCrossEntropy, Mixing
from robust_submission.training.recipe import MixupConfig, ObjectiveConfig

FALL_BACK_STEPS = 4
"""Attack steps of the objective that replaces one-step training after it has collapsed."""


def attack_revealed(
    attack: Attack, classifier: nn.Module, images: Tensor, labels: Tensor, seeds: Tensor
) -> Tensor:
    """Adversarial examples made through `reveal(classifier)`, in eval mode, with frozen weights.

    Mode and `requires_grad` are restored. An attacker that GCM misleads would train the model
    against noise.

    Args:
        attack: The attack.
        classifier: The bare classifier, not a parallel wrapper around it.
        images: (B, 3, H, W), float32, RGB, 0 to 1.
        labels: (B,), int64; or probabilities (B, num_classes), if the attack accepts them.
        seeds: (B,), int64, one seed per image for its random start.
    """
    with evaluating(classifier), frozen(classifier):
        return attack(reveal(classifier), images, labels, seeds=seeds)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy on clean images, or on adversarial examples (Madry et al. 2018).

    With an attack of one step this is fast adversarial training (Wong et al. 2020); with one that
    starts at noise of twice epsilon and is not clipped, N-FGSM (de Jorge et al. 2022).
    """

    attack: PGD | None = None
    """Makes the adversarial examples; None trains on clean images."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""

    def examples(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> tuple[Tensor, ...]:
        """The images to train on, (B, 3, H, W), and their labels, (B,)."""
        if self.attack:
            images = attack_revealed(self.attack, classifier, images, labels, seeds)
        return images, labels

    def loss(self, model: nn.Module, examples: tuple[Tensor, ...]) -> Tensor:
        """The mean."""
        images, labels = examples
        return F.cross_entropy(model(images).float(), labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class _CleanAndAdversarial(ABC):
    """Clean cross-entropy plus beta times a difference between clean and adversarial images.

    Both go through the model as one batch, so batch normalisation sees them together.
    """

    attack: PGD
    """Makes the adversarial examples."""
    beta: float
    """Weight of the difference."""
    label_smoothing: float = 0.0
    """Share of the clean images' target spread evenly over all classes."""

    def examples(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> tuple[Tensor, ...]:
        """Clean images, then adversarial ones, (2B, 3, H, W), and the labels, (B,)."""
        with evaluating(classifier), torch.no_grad():
            probabilities = classifier(images).float().softmax(1)
        attack, targets = self._attack_on(probabilities, labels)
        adversarial = attack_revealed(attack, classifier, images, targets, seeds)
        return torch.cat([images, adversarial]), labels

    def loss(self, model: nn.Module, examples: tuple[Tensor, ...]) -> Tensor:
        """The mean over the B images."""
        images, labels = examples
        clean, adversarial = model(images).float().chunk(2)
        natural = F.cross_entropy(clean, labels, label_smoothing=self.label_smoothing)
        return natural + self.beta * self._difference(clean, adversarial)

    @abstractmethod
    def _attack_on(self, probabilities: Tensor, labels: Tensor) -> tuple[PGD, Tensor]:
        """The attack and its labels, from clean probabilities (B, num_classes) and labels (B,)."""

    @abstractmethod
    def _difference(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        """The mean difference of logits, both (B, num_classes)."""


@dataclass(frozen=True, kw_only=True)
class Trades(_CleanAndAdversarial):
    """TRADES (Zhang et al. 2019): clean cross-entropy plus a divergence that an attack maximises.

    CE(f(x), y) + beta * KL(f(x) || f(x')), where x' maximises the divergence. For fixed f(x) the
    divergence has the same gradient at x' as the cross-entropy with the probabilities f(x) as
    labels, which is what the attack maximises. It starts at a random point of the ball, the
    authors' at normal noise of deviation 0.001: at x itself the gradient is zero.
    """

    beta: float = 6.0

    def _attack_on(self, probabilities: Tensor, labels: Tensor) -> tuple[PGD, Tensor]:
        return self.attack, probabilities

    def _difference(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        return F.kl_div(
            adversarial.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True
        )


@dataclass(frozen=True, kw_only=True)
class Guided(_CleanAndAdversarial):
    """Guided adversarial training, GAT (Sriramanan et al. 2020), for attacks of one step.

    CE(f(x), y) + beta * ||p(x) - p(x')||^2, where p are the probabilities and x' maximises
    CE(f(x'), y) + beta * ||p(x) - p(x')||^2. Unlike the authors' code the attack has the distance
    in every batch, not in every second one, and starts uniformly in the ball, not at one of the
    corners of half its size.
    """

    beta: float = 10.0

    def _attack_on(self, probabilities: Tensor, labels: Tensor) -> tuple[PGD, Tensor]:
        def apart(logits: Tensor, labels: Tensor) -> Tensor:
            distance = squared_distance(logits, probabilities)
            return cross_entropy(logits, labels) + self.beta * distance

        return replace(self.attack, loss=apart), labels

    def _difference(self, clean: Tensor, adversarial: Tensor) -> Tensor:
        return squared_distance(adversarial, clean.softmax(1)).mean()


def squared_distance(logits: Tensor, probabilities: Tensor) -> Tensor:
    """(B,): between the logits' probabilities and others, both (B, num_classes)."""
    return (logits.softmax(1) - probabilities).square().sum(1)


def build_objective(
    config: ObjectiveConfig, mixup: MixupConfig
) -> CrossEntropy | Trades | Guided | MixedCrossEntropy | Challenge:
    """The objective of a recipe, with its attack."""
    smoothing = config.label_smoothing
    if config.attacks:
        step_size = config.step_size  # None: PGD's own, which is too long for one step
        if step_size is None and config.steps == 1:
            step_size = 1.25 * config.epsilon
        attack = PGD(
            norm=config.norm,
            epsilon=config.epsilon,
            step_size=step_size,
            steps=config.steps,
            noise=config.noise,
            clip=config.clip,
        )
        if config.name != "adversarial":
            kind = Trades if config.name == "trades" else Guided
            beta = {} if config.beta is None else {"beta": config.beta}
            return kind(attack=attack, label_smoothing=smoothing, **beta)
        return CrossEntropy(attack=attack, label_smoothing=smoothing)
    if config.name == "challenge":
        return Challenge(label_smoothing=smoothing)
    if mixup.mixes:
        mixing = Mixing(mixup_alpha=mixup.mixup_alpha, cutmix_alpha=mixup.cutmix_alpha)
        return MixedCrossEntropy(mixing=mixing, probability=mixup.prob, label_smoothing=smoothing)
    return CrossEntropy(label_smoothing=smoothing)


def with_more_steps(objective: object) -> CrossEntropy | Trades | Guided | None:
    """An objective with an attack of one step, now of several; None for any other objective."""
    if not isinstance(objective, CrossEntropy | Trades | Guided):
        return None
    if objective.attack is None or objective.attack.steps > 1:
        return None
    several = {"steps": FALL_BACK_STEPS, "step_size": None, "noise": 1.0, "clip": True}
    attack = replace(objective.attack, **several)
    return replace(objective, attack=attack)


def validation_attack(epsilon: float, norm: str = "linf") -> PGD:
    """The attack that chooses the best epoch: ten steps, which one-step training cannot fool."""
    return PGD(norm=norm, epsilon=epsilon, step_size=epsilon / 4, steps=10)


ROBUST_ACCURACY = "val_robust_accuracy"


def collapsed_epoch(rows: Sequence[Mapping[str, float]]) -> int | None:
    """The first epoch (from 1) in which catastrophic overfitting was measured; None if in none.

    One-step adversarial training may learn to fool its own attack: within an epoch the accuracy
    under PGD falls from its best to almost nothing, while that under the one step rises (Wong et
    al. 2020). An epoch has collapsed if its accuracy under PGD is below half of the best so far,
    and at least 0.05 below it: the first epochs rise from nothing, with noise.

    Args:
        rows: The metrics of each epoch, as in metrics.csv. The answer depends on nothing else, so
            that a resumed run decides the same.
    """
    best = 0.0
    for epoch, row in enumerate(rows, start=1):
        accuracy = row.get(ROBUST_ACCURACY, best)
        if accuracy < 0.5 * best and accuracy <= best - 0.05:
            return epoch
        best = max(best, accuracy)
    return None


@contextmanager
def perturbed_weights(
    accelerator: Accelerator,
    classifier: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    gamma: float,
) -> Iterator[None]:
    """Adversarial weight perturbation, AWP (Wu et al. 2020): maximise the loss over the weights.

    Within the block each weight matrix is moved by one step of gradient ascent, of a size relative
    to its norm (equation 10); after it the weights are restored bit for bit. Weights of one
    dimension (biases, norms, layer scales) do not move, as in the paper. The ascent uses the
    classifier in eval mode, so that it draws no random numbers and changes no buffers.

    Args:
        accelerator: Averages the gradients over all processes, so that their weights stay equal.
        classifier: The bare classifier, not a parallel wrapper around it.
        loss: The loss to maximise, a function of the classifier.
        gamma: Size of the perturbation relative to the norm of each weight matrix.
    """
    weights = [each for each in classifier.parameters() if each.requires_grad and each.ndim > 1]
    with evaluating(classifier), torch.enable_grad():
        with accelerator.autocast():
            value = loss(classifier)
        if accelerator.scaler is not None:  # float16 gradients of whole layers would vanish
            value = accelerator.scaler.scale(value)
        gradients = accelerator.reduce(list(torch.autograd.grad(value, weights)), "mean")
    kept = [each.detach().clone() for each in weights]
    try:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                gradient.nan_to_num_(0, 0, 0)  # what overflows in float16 does not move
                length = gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
                weight.add_(gradient * (gamma * weight.norm() / length))
        yield
    finally:
        with torch.no_grad():
            for weight, former in zip(weights, kept, strict=True):
                weight.copy_(former)
