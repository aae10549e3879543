"""The objectives against closed forms, on what robust training gives up, and AWP."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks import PGD, UniformNoise
from robust_submission.cli.command import Ratio
from robust_submission.models.classifier import Normalize, RobustClassifier
from robust_submission.training.objectives import (
    Challenge,
    CrossEntropy,
    Guided,
    MixedCrossEntropy,
    Mixing,
    Trades,
    attack_revealed,
    build_objective,
    collapsed_epoch,
    perturbed_weights,
    validation_attack,
    with_more_steps,
)
from robust_submission.training.recipe import MixupConfig, ObjectiveConfig

SEEDS = torch.arange(16)
ATTACK = PGD(epsilon=8 / 255, steps=5)


@pytest.fixture
def classifier() -> RobustClassifier:
    torch.manual_seed(0)
    names = [str(digit) for digit in range(10)]
    model = RobustClassifier(class_names=names, backbone="test_convnext", image_size=32)
    for weight in model.backbone.parameters():  # initial weights give logits near 0
        torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture
def batch(classifier: RobustClassifier) -> tuple[Tensor, Tensor]:
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return images, classifier.eval()(images).argmax(1)


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(images), labels))


def test_examples_are_made_through_the_revealed_model(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor]
):
    images, labels = batch
    adversarial = attack_revealed(ATTACK, classifier, images, labels, SEEDS)
    misled = ATTACK(classifier.eval(), images, labels, seeds=SEEDS)
    clean, revealed, concealed = (
        cross_entropy(classifier, each, labels) for each in (images, adversarial, misled)
    )
    assert revealed - clean > 2 * (concealed - clean)
    assert (adversarial - images).abs().max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_requires_grad_are_restored_also_after_an_error(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor], training: bool
):
    def attack(*_: object, **__: object) -> Tensor:
        assert not any(weight.requires_grad for weight in classifier.parameters())
        assert not any(module.training for module in classifier.modules())
        raise InterruptedError

    first, *others = classifier.train(training).parameters()
    first.requires_grad_(False)
    with pytest.raises(InterruptedError):
        attack_revealed(attack, classifier, *batch, SEEDS)
    assert all(module.training is training for module in classifier.modules())
    assert not first.requires_grad and all(weight.requires_grad for weight in others)


@pytest.mark.parametrize(
    "objective",
    [*(kind(attack=PGD(steps=1)) for kind in (CrossEntropy, Trades, Guided)), Challenge()],
)
def test_every_objective_attacks_frozen_weights(
    objective: CrossEntropy | Trades | Guided | Challenge,
    classifier: RobustClassifier,
    batch: tuple[Tensor, Tensor],
):
    require_grad = list[bool]()

    def look(*_: object) -> None:
        if torch.is_grad_enabled():
            require_grad.append(any(weight.requires_grad for weight in classifier.parameters()))

    classifier.backbone.register_forward_pre_hook(look)
    objective.examples(classifier, *batch, SEEDS)
    assert require_grad and not any(require_grad)


def tsipras() -> tuple[Tensor, Tensor, Tensor]:
    """The example of Tsipras et al. 2019: one pixel is right for nine labels in ten under any
    attack, and many pixels are right for all labels together, each by less than epsilon."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    sign = (2 * labels - 1).float()
    images = 0.02 * sign.view(-1, 1, 1, 1) + 0.01 * torch.randn(256, 3, 4, 4, generator=generator)
    images[:, 0, 0, 0] = 0.1 * torch.where(torch.arange(256) // 2 % 10 == 0, -sign, sign)
    return images + 0.5, labels, torch.arange(256)


def trained_with(objective: CrossEntropy | Trades | Challenge) -> nn.Module:
    """A linear model trained with the objective on the example."""
    linear = nn.Linear(48, 2, bias=False)
    nn.init.zeros_(linear.weight)
    model = nn.Sequential(Normalize([0.5] * 3, [0.1] * 3), nn.Flatten(), linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        objective.loss(model, objective.examples(model, *tsipras())).backward()
        optimizer.step()
    return model


def test_robust_training_gives_up_the_features_that_an_attack_can_turn():
    def accuracies(objective: CrossEntropy | Trades) -> tuple[float, float]:
        model, (images, labels, seeds) = trained_with(objective), tsipras()
        adversarial = attack_revealed(ATTACK, model, images, labels, seeds)
        clean, robust = (model(each).argmax(1) == labels for each in (images, adversarial))
        return float(clean.float().mean()), float(robust.float().mean())

    assert accuracies(CrossEntropy()) == (1, 0)
    one_step = CrossEntropy(attack=PGD(epsilon=8 / 255, step_size=10 / 255, steps=1))
    for objective in (CrossEntropy(attack=ATTACK), one_step, Trades(attack=ATTACK)):
        assert accuracies(objective) == pytest.approx((0.9, 0.9), abs=0.01)


def test_the_challenge_lowers_the_loss_under_its_attack():
    models = [trained_with(Challenge(mixing=Mixing(largest=each))) for each in (0.08, 0.001)]
    images, labels, seeds = tsipras()
    for epsilon in (0.05, 0.08):  # of the radii from 0.001 to 0.08
        attacked, unattacked = (
            cross_entropy(
                model,
                attack_revealed(PGD(epsilon=epsilon, steps=5), model, images, labels, seeds),
                labels,
            )
            for model in models
        )
        assert attacked < 0.8 * unattacked


def test_trades_is_clean_cross_entropy_and_a_divergence(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor]
):
    images, labels = batch
    objective = Trades(attack=ATTACK, beta=3.0)
    examples = objective.examples(classifier.train(), images, labels, SEEDS)
    assert all(module.training for module in classifier.modules())
    value = objective.loss(classifier.eval(), examples)
    clean, adversarial = examples[0].chunk(2)
    assert torch.equal(clean, images) and (adversarial - images).abs().max() <= 8 / 255 + 1e-6

    def probabilities(at: Tensor) -> Tensor:
        powers = classifier(at).double().exp()
        return powers / powers.sum(1, keepdim=True)

    def divergence(at: Tensor) -> Tensor:
        own, moved = probabilities(images), probabilities(at)
        return (own * (own / moved).log()).sum(1).mean()

    surprise = -probabilities(images)[torch.arange(16), labels].log().mean()
    expected = surprise + 3 * divergence(adversarial)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    noise = UniformNoise(epsilon=8 / 255)(classifier, images, labels, seeds=SEEDS)
    assert divergence(adversarial) > 3 * divergence(noise)
    value.backward()  # through the clean output, too
    assert all(weight.grad is not None for weight in classifier.parameters())


def test_the_challenge_adds_four_cross_entropies(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor]
):
    images, labels = batch
    objective, classifier = Challenge(), classifier.eval()
    examples = objective.examples(classifier, images, labels, SEEDS)
    value = objective.loss(classifier, examples)
    clean, _, _, attacked = examples[0].chunk(4)
    partners = labels.view(8, 2).flip(1).flatten()
    share = examples[3].chunk(4)
    expected = torch.zeros(())
    for part, images_of_part in enumerate(examples[0].chunk(4)):
        targets = share[part][:, None] * F.one_hot(labels, 10)
        targets = targets + (1 - share[part][:, None]) * F.one_hot(partners, 10)
        expected = expected - (targets * classifier(images_of_part).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(value, expected)
    assert torch.equal(clean, images)
    assert torch.equal(share[0], torch.ones(16)) and torch.equal(share[3], torch.ones(16))
    assert cross_entropy(classifier, attacked, labels) > cross_entropy(classifier, clean, labels)


def test_mixed_cross_entropy_is_that_of_mixed_targets(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor]
):
    images, labels = batch
    objective = MixedCrossEntropy(mixing=Mixing(), label_smoothing=0.1)
    examples = objective.examples(classifier.eval(), images, labels, SEEDS)
    mixed, own, other, share = examples
    assert torch.equal(own, labels) and torch.equal(other, labels.view(8, 2).flip(1).flatten())
    targets = torch.lerp(F.one_hot(other, 10).float(), F.one_hot(own, 10).float(), share[:, None])
    expected = F.cross_entropy(classifier(mixed), 0.9 * targets + 0.01)
    torch.testing.assert_close(objective.loss(classifier, examples), expected)


def test_guided_is_clean_cross_entropy_and_a_squared_distance(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor]
):
    images, labels = batch
    objective = Guided(attack=PGD(steps=1), beta=3.0)
    (both, _) = objective.examples(classifier, images, labels, SEEDS)
    torch.testing.assert_close(both[:16], images, atol=0, rtol=0)
    with torch.no_grad():
        clean, adversarial = (classifier(each).double().softmax(1) for each in both.chunk(2))
        distance = ((clean - adversarial) ** 2).sum(1)
        expected = -clean[range(16), labels].log().mean() + 3 * distance.mean()
        found = objective.loss(classifier, (both, labels))
        misled = PGD(steps=1)(classifier, images, labels, seeds=SEEDS)
        at_random = ((clean - classifier(misled).softmax(1)) ** 2).sum(1)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert distance.mean() > 2 * at_random.mean()  # attacked through the revealed model


def test_an_objective_has_what_its_recipe_says():
    one_step = {"epsilon": Ratio("4/255"), "step_size": Ratio("5/255"), "steps": 1}
    attack = PGD(epsilon=4 / 255, step_size=5 / 255, steps=1)
    built = build_objective(ObjectiveConfig(name="adversarial", **one_step), MixupConfig())
    assert built == CrossEntropy(attack=attack)
    trades = ObjectiveConfig(name="trades", beta=2, label_smoothing=0.1, **one_step)
    built = build_objective(trades, MixupConfig())
    assert built == Trades(attack=attack, beta=2, label_smoothing=0.1)
    four_steps = PGD(epsilon=4 / 255, steps=4)
    assert isinstance(built, Trades)
    assert with_more_steps(built) == Trades(attack=four_steps, beta=2, label_smoothing=0.1)
    n_fgsm = {"norm": "l2", "noise": 2.0, "clip": False}
    guided = ObjectiveConfig(name="guided", beta=10, **n_fgsm, **one_step)
    built = build_objective(guided, MixupConfig())
    assert built == Guided(attack=replace(attack, **n_fgsm))
    assert with_more_steps(built) == Guided(attack=replace(four_steps, norm="l2"))
    steps = {"norm": "l2", "epsilon": Ratio("0.5")}
    several = build_objective(ObjectiveConfig(name="adversarial", **steps), MixupConfig())
    assert several == CrossEntropy(attack=PGD(norm="l2", epsilon=0.5, steps=10))
    guided = ObjectiveConfig(name="guided", steps=1, **steps)
    one = PGD(norm="l2", epsilon=0.5, step_size=0.625, steps=1)
    assert build_objective(guided, MixupConfig()) == Guided(attack=one, beta=10)
    assert with_more_steps(CrossEntropy(attack=ATTACK)) is None
    assert with_more_steps(CrossEntropy()) is None
    assert validation_attack(0.1, "l2") == PGD(norm="l2", epsilon=0.1, step_size=0.025, steps=10)
    assert build_objective(ObjectiveConfig(), MixupConfig()) == CrossEntropy()
    assert build_objective(ObjectiveConfig(name="challenge"), MixupConfig()) == Challenge()
    mixup = MixupConfig(cutmix_alpha=0.8, prob=0.5)
    built = build_objective(ObjectiveConfig(label_smoothing=0.1), mixup)
    mixing = Mixing(mixup_alpha=0, cutmix_alpha=0.8)
    assert built == MixedCrossEntropy(mixing=mixing, probability=0.5, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("accuracies", "epoch"),
    [
        ((), None),
        ((0.3,), None),
        ((0.2, 0.4, 0.2), None),  # half of the best is not below half
        ((0.2, 0.4, 0.19), 3),
        ((0.2, 0.4, 0.0, 0.45, 0.1), 3),  # the first stays the first
        ((0.4, 0.3, 0.21, 0.19), 4),  # compared with the best, not with the one before
        ((0.06, 0.02, 0.07), None),  # less than 0.05 below
        ((None, None), None),  # not measured
    ],
)
def test_a_collapse_is_a_fall_below_half_of_the_best(
    accuracies: tuple[float | None, ...], epoch: int | None
):
    rows = [{} if each is None else {"val_robust_accuracy": each} for each in accuracies]
    assert collapsed_epoch(rows) == epoch


IMAGES = torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def loss_on_images(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IMAGES), LABELS)


def closed_form(weight: Tensor, bias: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy with respect to the weight of a linear model."""
    surplus = (IMAGES.flatten(1) @ weight.T + bias).softmax(1) - F.one_hot(LABELS, 4)
    return surplus.T @ IMAGES.flatten(1) / 8


class Dropping(nn.Module):
    """A linear model with dropout, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 4)
        self.start = (self.linear.weight.detach().clone(), self.linear.bias.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(F.dropout(images.flatten(1), training=self.training))


@contextmanager
def perturbed(model: Dropping, **accelerator: Any) -> Iterator[Tensor]:
    """The change of the weight within the block."""
    alone = {"scaler": None, "autocast": nullcontext, "reduce": lambda gradients, _: gradients}
    fake: Any = SimpleNamespace(**alone | accelerator)
    with perturbed_weights(fake, model, loss_on_images, 0.1):
        yield (model.linear.weight - model.start[0]).detach()


def step_along(direction: Tensor, weight: Tensor) -> Tensor:
    return 0.1 * weight.norm() * direction / direction.norm()


def test_a_weight_moves_along_its_gradient_and_is_restored():
    model = Dropping()
    weight, bias = model.start
    expected = step_along(closed_form(weight, bias), weight)
    with perturbed(model) as moved:
        torch.testing.assert_close(moved, expected)
        assert torch.equal(model.linear.bias, bias)
        assert model.training and model.linear.weight.grad is None
        loss_on_images(model.eval()).backward()
    assert torch.equal(model.linear.weight, weight)
    torch.testing.assert_close(model.linear.weight.grad, closed_form(weight + expected, bias))
    with pytest.raises(KeyError), perturbed(model):
        raise KeyError
    assert torch.equal(model.linear.weight, weight)


def test_all_processes_use_the_mean_gradient_and_what_overflows_does_not_move():
    model, seen = Dropping(), list[Tensor]()
    weight, bias = model.start
    other = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))

    def mean(gradients: list[Tensor], reduction: str) -> list[Tensor]:
        assert reduction == "mean"
        seen.append(gradients[0] / 2**20)
        average = (seen[0] + other) / 2
        average[0], average[1] = torch.inf, torch.nan
        return [average]

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    with perturbed(model, scaler=scaler, reduce=mean) as moved:
        expected = (closed_form(weight, bias) + other) / 2
        expected[:2] = 0
        torch.testing.assert_close(moved, step_along(expected, weight))
    torch.testing.assert_close(seen[0], closed_form(weight, bias))
