from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks.pgd import PGD, UniformNoise
from robust_submission.models.classifier import Normalize, RobustClassifier
from robust_submission.training.mixing import Mixing
from robust_submission.training.objectives import (
    Challenge,
    CrossEntropy,
    MixedCrossEntropy,
    Trades,
    attack_revealed,
    build_fall_back,
    build_objective,
    validation_attack,
)
from robust_submission.training.recipe import ObjectiveConfig, Ratio

SEEDS = torch.arange(16)


@pytest.fixture
def classifier() -> RobustClassifier:
    torch.manual_seed(0)
    names = [str(digit) for digit in range(10)]
    model = RobustClassifier(class_names=names, backbone="test_convnext", image_size=32)
    for weight in model.backbone.parameters():  # far from its start, where logits are near 0
        torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture
def batch(classifier: RobustClassifier) -> tuple[Tensor, Tensor]:
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return images, classifier.eval()(images).argmax(1)


def loss(model: RobustClassifier, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(images), labels))


def test_standard_is_cross_entropy(classifier: RobustClassifier, batch: tuple[Tensor, Tensor]):
    images, labels = batch
    objective = CrossEntropy()
    value = objective.loss(
        classifier.eval(), objective.examples(classifier, (images, labels, SEEDS))
    )
    expected = -classifier(images).log_softmax(1)[torch.arange(16), labels].mean()
    torch.testing.assert_close(value, expected)


def test_examples_are_made_through_the_revealed_model(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor]
):
    images, labels = batch
    attack = PGD(epsilon=8 / 255, steps=5)
    adversarial = attack_revealed(attack, classifier, images, labels, SEEDS)
    misled = attack(classifier.eval(), images, labels, seeds=SEEDS)
    clean = loss(classifier, images, labels)
    assert loss(classifier, adversarial, labels) > clean + 2 * (
        loss(classifier, misled, labels) - clean
    )
    assert (adversarial - images).abs().max() <= 8 / 255 + 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_gradients_are_left_as_found(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor], training: bool
):
    classifier.train(training)
    attack_revealed(PGD(steps=1), classifier, *batch, SEEDS)
    assert all(module.training is training for module in classifier.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in classifier.parameters())


def test_weights_are_frozen_during_the_attack_alone(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor]
):
    def attack(*_: object, **__: object) -> Tensor:
        assert not any(weight.requires_grad for weight in classifier.parameters())
        raise InterruptedError

    first, *others = classifier.parameters()
    first.requires_grad_(False)
    with pytest.raises(InterruptedError):
        attack_revealed(attack, classifier, *batch, SEEDS)
    assert not first.requires_grad
    assert all(weight.requires_grad for weight in others)


@pytest.mark.parametrize(
    "objective", [CrossEntropy(attack=PGD(steps=1)), Trades(attack=PGD(steps=1)), Challenge()]
)
def test_every_objective_attacks_frozen_weights(
    objective: CrossEntropy | Trades | Challenge,
    classifier: RobustClassifier,
    batch: tuple[Tensor, Tensor],
):
    learned = list[bool]()

    def look(*_: object) -> None:
        if torch.is_grad_enabled():
            learned.append(any(weight.requires_grad for weight in classifier.parameters()))

    classifier.backbone.register_forward_pre_hook(look)
    objective.examples(classifier, (*batch, SEEDS))
    assert learned and not any(learned)


def tsipras() -> tuple[Tensor, Tensor, Tensor]:
    """The example of Tsipras et al. 2019: one value tells nine labels in ten whatever the attack
    does, and many tell all of them together, by less than epsilon each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    sign = (2 * labels - 1).float()
    images = 0.02 * sign.view(-1, 1, 1, 1) + 0.01 * torch.randn(256, 3, 4, 4, generator=generator)
    images[:, 0, 0, 0] = 0.1 * torch.where(torch.arange(256) // 2 % 10 == 0, -sign, sign)
    return images + 0.5, labels, torch.arange(256)


ATTACK = PGD(epsilon=8 / 255, steps=5)


def trained_with(objective: CrossEntropy | Trades | Challenge) -> nn.Module:
    """A linear model that minimised the objective on the example."""
    images, labels, seeds = tsipras()
    linear = nn.Linear(48, 2, bias=False)
    nn.init.zeros_(linear.weight)
    model = nn.Sequential(Normalize([0.5] * 3, [0.1] * 3), nn.Flatten(), linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        objective.loss(model, objective.examples(model, (images, labels, seeds))).backward()
        optimizer.step()
    return model


def accuracies_after(objective: CrossEntropy | Trades) -> tuple[float, float]:
    """Clean and robust accuracy."""
    model, (images, labels, seeds) = trained_with(objective), tsipras()
    adversarial = attack_revealed(ATTACK, model, images, labels, seeds)
    clean, robust = (model(each).argmax(1) == labels for each in (images, adversarial))
    return float(clean.float().mean()), float(robust.float().mean())


def test_robust_training_gives_up_the_features_that_an_attack_can_turn():
    assert accuracies_after(CrossEntropy()) == (1, 0)
    one_step = CrossEntropy(attack=PGD(epsilon=8 / 255, step_size=10 / 255, steps=1))
    for objective in (CrossEntropy(attack=ATTACK), one_step, Trades(attack=ATTACK)):
        assert accuracies_after(objective) == pytest.approx((0.9, 0.9), abs=0.01)


@pytest.fixture(scope="module")
def challenged() -> tuple[nn.Module, nn.Module]:
    """Trained under the challenge's attack, and without one."""
    unattacked = Challenge(mixing=Mixing(smallest=0, largest=0))
    return trained_with(Challenge()), trained_with(unattacked)


@pytest.mark.parametrize("epsilon", [0.05, 0.08])  # of the radii from 0.001 to 0.08
def test_the_challenge_lowers_the_loss_under_its_attack(
    challenged: tuple[nn.Module, nn.Module], epsilon: float
):
    images, labels, seeds = tsipras()

    def robust_loss(model: nn.Module) -> float:
        attack = PGD(epsilon=epsilon, steps=5)
        adversarial = attack_revealed(attack, model, images, labels, seeds)
        with torch.no_grad():
            return float(F.cross_entropy(model(adversarial), labels))

    attacked, unattacked = map(robust_loss, challenged)
    assert attacked < 0.8 * unattacked


def test_trades_is_clean_cross_entropy_and_a_divergence(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor]
):
    images, labels = batch
    objective = Trades(attack=ATTACK, beta=3.0)
    examples = objective.examples(classifier.train(), (images, labels, SEEDS))
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
    examples = objective.examples(classifier, (images, labels, SEEDS))
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
    assert torch.equal(clean, images) and torch.equal(share[0], torch.ones(16))
    assert torch.equal(share[3], torch.ones(16))
    assert loss(classifier, attacked, labels) > loss(classifier, clean, labels)


def test_mixed_cross_entropy_is_that_of_mixed_targets(
    classifier: RobustClassifier, batch: tuple[Tensor, Tensor]
):
    images, labels = batch
    objective = MixedCrossEntropy(mixing=Mixing(), label_smoothing=0.1)
    examples = objective.examples(classifier.eval(), (images, labels, SEEDS))
    mixed, own, other, share = examples
    assert torch.equal(own, labels) and torch.equal(other, labels.view(8, 2).flip(1).flatten())
    targets = torch.lerp(F.one_hot(other, 10).float(), F.one_hot(own, 10).float(), share[:, None])
    expected = F.cross_entropy(classifier(mixed), 0.9 * targets + 0.01)
    torch.testing.assert_close(objective.loss(classifier, examples), expected)


def test_the_fall_back_takes_more_steps_of_the_same_ball():
    one_step = ObjectiveConfig(name="adversarial", epsilon=Ratio("4/255"), steps=1)
    fall_back = build_fall_back(one_step)
    assert isinstance(fall_back, CrossEntropy) and fall_back.attack is not None
    assert fall_back.attack.steps == 4 and fall_back.attack.epsilon == 4 / 255
    trades = build_fall_back(ObjectiveConfig(name="trades", steps=1, beta=2))
    assert isinstance(trades, Trades) and trades.beta == 2 and trades.attack.steps == 4
    for config in (
        ObjectiveConfig(name="adversarial", steps=1, fall_back=False),
        ObjectiveConfig(name="adversarial", steps=2),
        ObjectiveConfig(name="challenge", steps=1),
        ObjectiveConfig(),
    ):
        assert build_fall_back(config) is None


def test_the_validation_attack_takes_ten_steps_of_the_same_ball():
    config = ObjectiveConfig(name="adversarial", epsilon=Ratio("4/255"), steps=1)
    objective = build_objective(config)
    assert isinstance(objective, CrossEntropy)
    assert objective.attack is not None and objective.attack.steps == 1
    attack = validation_attack(config)
    assert attack is not None and attack.steps == 10 and attack.epsilon == 4 / 255
    assert validation_attack(ObjectiveConfig()) is None
    assert validation_attack(ObjectiveConfig(name="challenge")) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps >= 1"),
        ({"name": "trades", "beta": -1.0}, "beta, awp_gamma, awp_warmup >= 0"),
        ({"name": "challenge", "awp_gamma": 0.01}, "expected adversarial or trades"),
    ],
)
def test_bad_objectives(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**arguments)
