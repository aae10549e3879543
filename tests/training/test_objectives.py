import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.gradient import PGD
from models.classifier import Normalize, RobustClassifier
from training.objectives import Objective, attack_revealed, build_objective, validation_attack
from training.recipe import ObjectiveConfig, Ratio

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
    value = Objective()(classifier.eval(), classifier, (images, labels, SEEDS))
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


def test_adversarial_training_gives_up_the_features_that_an_attack_can_turn():
    """The example of Tsipras et al. 2019: one value tells nine labels in ten whatever the attack
    does, and many tell all of them together, by less than epsilon each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    sign = (2 * labels - 1).float()
    images = 0.02 * sign.view(-1, 1, 1, 1) + 0.01 * torch.randn(256, 3, 4, 4, generator=generator)
    images[:, 0, 0, 0] = 0.1 * torch.where(torch.arange(256) // 2 % 10 == 0, -sign, sign)
    images += 0.5
    attack, seeds = PGD(epsilon=8 / 255, steps=5), torch.arange(256)

    def accuracies_after(objective: Objective) -> tuple[float, float]:
        linear = nn.Linear(48, 2, bias=False)
        nn.init.zeros_(linear.weight)
        model = nn.Sequential(Normalize([0.5] * 3, [0.1] * 3), nn.Flatten(), linear)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(200):
            optimizer.zero_grad()
            objective(model, model, (images, labels, seeds)).backward()
            optimizer.step()
        adversarial = attack_revealed(attack, model, images, labels, seeds)
        clean, robust = (model(each).argmax(1) == labels for each in (images, adversarial))
        return float(clean.float().mean()), float(robust.float().mean())

    assert accuracies_after(Objective()) == (1, 0)
    assert accuracies_after(Objective(attack=attack)) == pytest.approx((0.9, 0.9), abs=0.01)


def test_the_validation_attack_takes_ten_steps_of_the_same_ball():
    config = ObjectiveConfig(name="adversarial", epsilon=Ratio("4/255"), steps=1)
    objective = build_objective(config)
    assert objective.attack is not None and objective.attack.steps == 1
    attack = validation_attack(config)
    assert attack is not None and attack.steps == 10 and attack.epsilon == 4 / 255
    assert validation_attack(ObjectiveConfig()) is None
