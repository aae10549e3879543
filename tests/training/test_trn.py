from dataclasses import replace
from functools import partial
from typing import get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks.pgd import FGSM, PGD
from robust_submission.models.classifier import RobustClassifier, reveal, undefended
from robust_submission.models.surgery import frozen
from robust_submission.models.trn import TRN
from robust_submission.models.trn.gradient_map import Estimator, gradient_map
from robust_submission.training.objectives import (
    RestorationLoss,
    RestorationObjective,
    attack_unaware,
    build_restoration,
)
from robust_submission.training.recipe import AttackConfig, RestorationConfig, TRNConfig

IMAGES = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SEEDS = torch.arange(64) * 7919


@pytest.fixture
def classifier() -> RobustClassifier:
    torch.manual_seed(0)
    names = [str(digit) for digit in range(10)]
    model = RobustClassifier(class_names=names, backbone="test_convnext", image_size=32)
    for weight in model.backbone.parameters():
        nn.init.normal_(weight, std=0.2)
    model.requires_grad_(False)
    model.attach_trn(TRN(width=8, depth=1, surrogate={"num_classes": 10, "widths": [16]}))
    return model.eval()


@pytest.fixture
def labels(classifier: RobustClassifier) -> Tensor:
    with torch.no_grad():
        return classifier(IMAGES).argmax(1)


def test_the_attacker_sees_the_classifier_and_nothing_before_it(
    classifier: RobustClassifier, labels: Tensor
):
    classifier.train()
    attack = PGD(epsilon=8 / 255, steps=2)
    found = attack_unaware(attack, classifier, IMAGES, labels, SEEDS)
    assert all(part.training for part in classifier.modules())
    classifier.eval()
    assert torch.equal(found, attack(undefended(classifier), IMAGES, labels, seeds=SEEDS))
    aware = attack(reveal(classifier, bypass=True), IMAGES, labels, seeds=SEEDS)
    torch.testing.assert_close(found, aware)  # a fresh TRN changes nothing


def test_each_image_draws_its_attack_whatever_its_batch(
    classifier: RobustClassifier, labels: Tensor
):
    weak, strong = FGSM(epsilon=1 / 255), FGSM(epsilon=16 / 255)
    attacks = [partial(attack_unaware, each) for each in (weak, strong)]
    objective = RestorationObjective(attacks=attacks, weights=[1, 2], clean=0.25)
    images, found, _ = objective.examples(classifier, IMAGES, labels, SEEDS)
    assert torch.equal(images, IMAGES)
    size = (found - IMAGES).abs().amax((1, 2, 3)) * 255
    kinds = torch.stack([size < 0.5, (size - 1).abs() < 0.5, (size - 16).abs() < 0.5]).sum(1)
    assert kinds.sum() == 64
    np.testing.assert_allclose(kinds, [16, 16, 32], atol=9)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    again = torch.cat(
        [objective.examples(classifier, IMAGES[p], labels[p], SEEDS[p])[1] for p in order.split(10)]
    )
    torch.testing.assert_close(again, found[order])


def test_an_adaptive_attack_goes_through_the_map(classifier: RobustClassifier, labels: Tensor):
    trn = classifier.restore
    assert isinstance(trn, TRN)
    nn.init.normal_(trn.head.weight, std=0.1)
    config = RestorationConfig(attacks=[AttackConfig(name="fgsm", adaptive=True)], clean=0)
    _, found, _ = build_restoration(config).examples(classifier, IMAGES, labels, SEEDS)
    with frozen(classifier):
        pixels = IMAGES.clone().requires_grad_()
        gradients = trn.gradient_map(pixels, classifier.classify, differentiable=True)
        logits = classifier.classify(trn.restore(pixels, gradients))
        (ascent,) = torch.autograd.grad(F.cross_entropy(logits, labels), pixels)
    expected = (IMAGES + 8 / 255 * ascent.sign()).clamp(0, 1)
    assert ((found - expected).abs() < 1e-6).double().mean() > 0.99  # signs of nothing may differ


def test_a_cache_gives_what_was_made_and_makes_it_once(
    classifier: RobustClassifier, labels: Tensor
):
    config = RestorationConfig(attacks=[AttackConfig(name="fgsm")], cache=True)
    cached, plain = map(build_restoration, (config, replace(config, cache=False)))
    _, expected, _ = plain.examples(classifier, IMAGES, labels, SEEDS)
    _, first, _ = cached.examples(classifier, IMAGES[:40], labels[:40], SEEDS[:40])
    _, both, _ = cached.examples(classifier, IMAGES, labels, SEEDS)
    torch.testing.assert_close(both, expected)
    assert torch.equal(both[:40], first)
    nothing = torch.zeros_like(IMAGES)  # what is in the cache is not made again
    assert torch.equal(cached.examples(classifier, nothing, labels, SEEDS)[1], both)


def test_the_loss_is_the_sum_of_its_terms(classifier: RobustClassifier, labels: Tensor):
    attacked = (IMAGES + 0.05).clamp(0, 1)
    zero = {"reconstruction": 0.0, "cross_entropy": 0.0, "feature": 0.0, "distillation": 0.0}

    def loss(**weights: float) -> Tensor:
        config = RestorationConfig(**(zero | weights))  # pyright: ignore[reportArgumentType]
        return RestorationLoss(classifier, config).eval()(IMAGES, attacked, labels)

    difference = (attacked - IMAGES).abs().mean()  # a fresh TRN restores nothing
    torch.testing.assert_close(loss(reconstruction=2), 2 * difference)
    logits = classifier.classify(attacked)
    surprise = -logits.log_softmax(1)[torch.arange(64), labels].mean()
    torch.testing.assert_close(loss(cross_entropy=1), surprise)
    normalized = [classifier.normalize(each) for each in (attacked, IMAGES)]
    features = [classifier.backbone.forward_features(each) for each in normalized]  # pyright: ignore[reportCallIssue]
    relative = (features[0] - features[1]).abs().mean() / features[1].abs().mean()
    torch.testing.assert_close(loss(feature=3), 3 * relative)
    parts = loss(reconstruction=2) + loss(cross_entropy=1) + loss(feature=3) + loss(distillation=1)
    whole = loss(reconstruction=2, cross_entropy=1, feature=3, distillation=1)
    torch.testing.assert_close(whole, parts)


def test_distillation_brings_the_maps_together(classifier: RobustClassifier, labels: Tensor):
    config = RestorationConfig(reconstruction=0, cross_entropy=0)
    module, trn = RestorationLoss(classifier, config), classifier.restore
    images, labels = IMAGES[:16], labels[:16]
    assert isinstance(trn, TRN) and trn.surrogate is not None
    wanted = gradient_map(images, classifier.classify, "predicted")

    def cosine() -> float:
        found = trn.gradient_map(images, classifier.classify)
        assert found is not None
        return nn.functional.cosine_similarity(found.flatten(1), wanted.flatten(1)).mean().item()

    before = cosine()
    optimizer = torch.optim.Adam(trn.parameters(), lr=1e-2)
    for _ in range(75):
        optimizer.zero_grad()
        module(images, images, labels).backward()
        optimizer.step()
    assert abs(before) < 0.1 and cosine() > 0.2
    assert all(weight.grad is None for weight in classifier.backbone.parameters())


def test_a_classifier_that_learns_is_frozen_for_attacks_and_maps(
    classifier: RobustClassifier, labels: Tensor
):
    backbone, states = classifier.backbone, list[bool]()

    def look(*_: object) -> None:
        if torch.is_grad_enabled():
            states.append(any(weight.requires_grad for weight in backbone.parameters()))

    backbone.requires_grad_(True).register_forward_pre_hook(look)
    attack_unaware(FGSM(epsilon=8 / 255), classifier, IMAGES, labels, SEEDS)
    assert states == [False]
    config = RestorationConfig(reconstruction=0, feature=0, distillation=1, end_to_end=True)
    RestorationLoss(classifier, config)(IMAGES, IMAGES, labels)
    assert states == [False, True, False]  # cross-entropy learns, the map's pass does not


def test_a_frozen_classifier_stays_in_eval_mode(classifier: RobustClassifier):
    frozen = RestorationLoss(classifier, RestorationConfig()).train()
    assert frozen.training and classifier.restore.training and not classifier.backbone.training
    assert RestorationLoss(classifier, RestorationConfig(end_to_end=True)).train()
    assert classifier.backbone.training


def test_features_need_a_timm_backbone():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    model = RobustClassifier(class_names=["a", "b"], image_size=32, backbone=network)
    with pytest.raises(ValueError, match="expected a timm backbone with forward_features"):
        RestorationLoss(model, RestorationConfig(feature=1))


def test_the_recipe_names_every_estimator():
    """Without importing what implements them."""
    assert get_type_hints(TRNConfig)["estimator"] == Estimator
