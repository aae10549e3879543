"""The gradient loop: closed forms, relations between attacks, early stop, restarts and draws."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_submission.attacks import (
    BIM,
    FFGSM,
    FGSM,
    MIM,
    NORMS,
    PGD,
    UniformNoise,
    build_attack,
    image_seeds,
    input_gradient,
)
from robust_submission.attacks.losses import LOSSES

BUDGETS = {"linf": 0.15, "l2": 0.8, "l1": 8.0, "l1-dense": 8.0}
GRADIENT = ["fgsm", "ffgsm", "bim", "mim", "pgd"]


class Linear(nn.Module):
    """A linear binary classifier: logits (0, w . x)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = (images * self.weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.fixture
def linear() -> Linear:
    return Linear(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(3)))


def optimum(weight: torch.Tensor, norm: str) -> torch.Tensor:
    """The perturbation of size one that increases w . x most."""
    if norm == "linf":
        return weight.sign()
    if norm == "l2":
        return weight / weight.norm()
    best = weight.abs().argmax()
    return torch.zeros(48).index_put((best,), weight.flatten()[best].sign()).view(3, 4, 4)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("targeted", [False, True])
def test_finds_the_optimum_of_a_linear_model(linear, norm, name, targeted):
    images = torch.full((4, 3, 4, 4), 0.5)  # epsilon 0.1 reaches no wall
    labels = torch.tensor([0, 0, 1, 1])
    attack = build_attack(name, 0.1, norm, targeted=targeted)
    found = attack(linear, images, labels) - images
    toward = torch.where(labels == 0, 1, -1) * (-1 if targeted else 1)
    expected = 0.1 * toward.view(-1, 1, 1, 1) * optimum(linear.weight.detach(), norm)
    if name in ("bim", "mim", "fgsm") or (norm == "linf" and name == "pgd"):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    else:  # a random start is corrected only as far as the steps reach
        gain = (found * linear.weight).flatten(1).sum(1) * toward
        best = (expected * linear.weight).flatten(1).sum(1) * toward
        assert (gain <= best * (1 + 1e-5)).all()
        assert (gain >= best * (0.95 if name == "pgd" else 0.6)).all()


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([*GRADIENT, "noise"]),
    epsilon=st.floats(1e-4, 20),
    seed=st.integers(0, 2**31),
)
def test_stays_inside_ball_and_box(digits, norm, name, epsilon, seed):
    model, images, labels = digits.first(6)
    images = images + 0.3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    images = images.clamp(0, 1)
    attack = build_attack(name, epsilon, norm)
    found = attack(model, images, labels, torch.Generator().manual_seed(seed))
    assert found.min() >= 0 and found.max() <= 1
    size = NORMS[norm].size(found.double() - images.double())
    rounding = 6e-8 * (192 if norm.startswith("l1") else 14)  # a float32 pixel's; 14 = sqrt(192)
    assert (size <= epsilon * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_maximises_the_given_loss(digits, norm, loss):
    attack = PGD(norm=norm, epsilon=BUDGETS[norm] / 20, loss=loss, random_start=False)
    found = attack(*digits)
    with torch.no_grad():
        before, after = (
            LOSSES[loss](digits.model(images), digits.labels) for images in (digits.images, found)
        )
    assert (after > before).float().mean() >= 0.98


def test_losses_against_numpy(linear):
    logits = np.random.default_rng(0).normal(size=(6, 5))
    labels = np.array([0, 1, 2, 3, 4, 0])
    own = logits[np.arange(6), labels]
    others = np.where(np.eye(5)[labels] == 1, -np.inf, logits).max(axis=1)
    ordered = np.sort(logits, axis=1)
    expected = {
        "ce": np.log(np.exp(logits).sum(axis=1)) - own,
        "margin": others - own,
        "dlr": -(own - others) / (ordered[:, -1] - ordered[:, -3]),
    }
    expected["bounded-ce"] = expected["ce"]  # the largest two are less than 12 apart
    for name, loss in LOSSES.items():
        found = loss(torch.tensor(logits), torch.tensor(labels))
        np.testing.assert_allclose(found, expected[name], rtol=1e-9)
    with pytest.raises(ValueError, match="at least 3 classes, found 2"):
        PGD(loss="dlr")(linear, torch.rand(1, 3, 4, 4), torch.tensor([0]))


def test_bounded_cross_entropy_has_the_gradient_of_a_softer_softmax():
    logits = torch.tensor([[4000.0, 1000.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(LOSSES["bounded-ce"](logits, torch.tensor([0])).sum(), logits)
    soft = np.exp(np.array([16.0, 4.0, 0.0]) - 16)
    expected = (soft / soft.sum() - np.array([1, 0, 0])) * 12 / 3000
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-2)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_targeted_reaches_its_target(digits, norm):
    targets = digits._replace(labels=(digits.labels + 1) % 10)
    attack = PGD(norm=norm, epsilon=4 * BUDGETS[norm], steps=20, targeted=True)
    assert targets.accuracy(targets.images) < 0.05
    assert targets.accuracy(attack(*targets)) > 0.8


def test_relations_between_the_attacks(digits):
    image, steps = {"random_start": False}, {"steps": 7, "step_size": 0.02}
    pairs = [
        (FGSM(epsilon=0.1), PGD(epsilon=0.1, steps=1, step_size=0.1, **image)),
        (FFGSM(epsilon=0.1), PGD(epsilon=0.1, steps=1, step_size=0.125)),
        (BIM(epsilon=0.1, **steps), PGD(epsilon=0.1, **steps, **image)),
        (MIM(epsilon=0.1, decay=0), BIM(epsilon=0.1)),
        (PGD(epsilon=0.1, steps=5), PGD(epsilon=0.1, steps=5, step_size=0.05)),
    ]
    for attack, twin in pairs:
        assert torch.equal(attack(*digits), twin(*digits))
    assert not torch.equal(MIM(epsilon=0.1)(*digits), BIM(epsilon=0.1)(*digits))


def test_mim_against_its_definition(digits):
    model, images, labels = digits
    points, velocity = images.clone(), torch.zeros_like(images)
    for _ in range(4):
        points.requires_grad_()
        loss = nn.functional.cross_entropy(model(points), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, points)
        velocity = 0.9 * velocity + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        points = (points + 0.02 * velocity.sign()).detach()
        points = torch.min(torch.max(points, images - 0.05), images + 0.05).clamp(0, 1)
    attack = MIM(epsilon=0.05, step_size=0.02, steps=4, decay=0.9)
    torch.testing.assert_close(attack(model, images, labels), points, atol=1e-6, rtol=0)


def test_a_confident_image_has_a_gradient_in_float16():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    nn.init.uniform_(network[1].weight, 0.01, 0.02)
    nn.init.constant_(network[1].bias, 0)
    with torch.no_grad():
        network[1].weight[1] *= -1
        network[1].bias[1] = -15  # a loss of 2e-7: in float16 its product with a weight is 0
    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.int64)
    expected, _ = input_gradient(network, images, labels, LOSSES["ce"])
    with torch.autocast("cpu", torch.float16):
        found, _ = input_gradient(network, images, labels, LOSSES["ce"])
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_unusual_gradients(digits, norm):
    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images):
            return images.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient[:, 0], gradient[:, 1, ::2] = torch.nan, torch.inf
            return gradient

    def poisoned(images):
        return digits.model(Poisoned.apply(images))

    def brightness(images):  # autograd then gives an expanded tensor, which nothing may write to
        total = images.sum((1, 2, 3))
        return torch.stack([total, -total], dim=1)

    found = PGD(norm=norm, epsilon=0.5)(poisoned, digits.images, digits.labels)
    assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1
    assert (NORMS[norm].size(found - digits.images) <= 0.5 * (1 + 1e-5)).all()
    images = torch.full((2, 3, 4, 4), 0.5)
    for attack in (PGD(norm=norm, random_start=False), MIM(norm=norm)):
        found = attack(brightness, images, torch.tensor([0, 1]))
        assert (found[0] <= images[0]).all() and (found[1] >= images[1]).all()
        assert (found.sum((1, 2, 3)) != images.sum((1, 2, 3))).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("early_stop", [False, True])
def test_seeds_make_an_image_independent_of_its_batch(digits, norm, early_stop):
    precise = copy.deepcopy(digits.model).double()

    def model(images):
        # Rounding in float32 differs by the batch, and much where the loss is small.
        return precise(images.double())

    attack = PGD(norm=norm, epsilon=BUDGETS[norm], steps=3, restarts=2, early_stop=early_stop)
    seeds = image_seeds(0, range(100))
    whole = attack(model, digits.images, digits.labels, seeds=seeds)
    rows = torch.tensor([50, 3, 99, 8, 4])
    part = attack(model, digits.images[rows], digits.labels[rows], seeds=seeds[rows])
    torch.testing.assert_close(part, whole[rows], atol=1e-6, rtol=0)
    other = attack(model, digits.images, digits.labels, seeds=image_seeds(1, range(100)))
    assert (other != whole).flatten(1).any(1).float().mean() > 0.5
    noise = UniformNoise(norm=norm, epsilon=0.3)  # no model, no rounding: the same bits
    whole = noise(*digits, seeds=seeds)
    assert torch.equal(noise(*digits.first(7), seeds=seeds[:7]), whole[:7])


def test_a_generator_is_used_and_moved_on(digits):
    attack = FFGSM(epsilon=0.1)
    generator = torch.Generator().manual_seed(1)
    first, second = (attack(*digits, generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, attack(*digits, torch.Generator().manual_seed(1)))
    assert torch.equal(attack(*digits), attack(*digits))
    assert torch.equal(first, replace(attack, seed=1)(*digits))


@pytest.mark.parametrize("name", GRADIENT)
def test_early_stop_keeps_every_success_and_returns_the_first(digits, name):
    plain = build_attack(name, 0.08)
    early = replace(plain, early_stop=True)
    seeds = image_seeds(0, range(100))
    last, first = (attack(*digits, seeds=seeds) for attack in (plain, early))
    assert not (digits.fooled(last) & ~digits.fooled(first)).any()
    stands = ~digits.fooled(first)
    torch.testing.assert_close(first[stands], last[stands], atol=1e-6, rtol=0)
    if not plain.random_start:  # an image that is wrong already needs no step
        wrong = digits.fooled(digits.images)
        assert wrong.any() and torch.equal(first[wrong], digits.images[wrong])


def test_early_stop_finds_exactly_the_images_fooled_anywhere_on_the_way(digits):
    attack = BIM(epsilon=0.08, step_size=0.02, steps=8)
    anywhere, first = digits.fooled(digits.images), digits.images.clone()
    for steps in range(1, 9):  # BIM has no randomness: its prefix is the shorter attack
        points = replace(attack, steps=steps)(*digits)
        new = digits.fooled(points) & ~anywhere
        first[new] = points[new]
        anywhere |= new
    early = replace(attack, early_stop=True)(*digits)
    assert torch.equal(digits.fooled(early), anywhere)
    torch.testing.assert_close(early[anywhere], first[anywhere], atol=1e-6, rtol=0)


def test_early_stop_saves_the_model_work(digits):
    seen = []

    def counting(images):
        seen.append(len(images))
        return digits.model(images)

    BIM(epsilon=0.3, steps=10, early_stop=True)(counting, digits.images, digits.labels)
    assert seen[0] == 100 and seen == sorted(seen, reverse=True) and seen[-1] < 50
    assert all(size == 100 or size % 8 == 0 for size in seen)  # few sizes of batch
    seen.clear()
    BIM(epsilon=1, steps=50, early_stop=True)(counting, digits.images, digits.labels)
    assert 0 < len(seen) < 50  # ends once every image is fooled
    seen.clear()
    BIM(epsilon=0.3, steps=10)(counting, digits.images, digits.labels)
    assert seen == [100] * 10  # and not one forward pass more


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_more_restarts_never_hurt(digits, early_stop, loss):
    seeds = image_seeds(0, range(100))
    before = None
    for restarts in (2, 3, 5):
        attack = PGD(epsilon=0.05, steps=2, restarts=restarts, early_stop=early_stop, loss=loss)
        found = attack(*digits, seeds=seeds)
        if before is not None:
            assert not (digits.fooled(before) & ~digits.fooled(found)).any()
            both = digits.fooled(before) == digits.fooled(found)
            with torch.no_grad():
                old, new = (
                    LOSSES[loss](digits.model(each), digits.labels)[both]
                    for each in (before, found)
                )
            assert (new >= old - 1e-4).all()
        before = found


@pytest.mark.parametrize(("norm", "length"), [("linf", math.inf), ("l2", 2)])
def test_n_fgsm_leaves_the_ball_by_its_noise_and_one_step(digits, norm, length):
    """de Jorge et al. 2022, equation 4: the image, noise of twice epsilon, a step of epsilon."""
    model, images, labels = digits
    noise = UniformNoise(norm=norm, epsilon=0.1)(model, images, labels)
    (gradient,) = torch.autograd.grad(
        nn.functional.cross_entropy(model(noise.requires_grad_()), labels, reduction="sum"), noise
    )
    step = gradient.sign()
    if norm == "l2":
        step = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = (noise + 0.05 * step).detach().clamp(0, 1)
    attack = PGD(norm=norm, epsilon=0.05, steps=1, step_size=0.05, noise=2, clip=False)
    found = attack(model, images, labels)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    moved = torch.linalg.vector_norm((found - images).flatten(1), length, dim=1)
    assert (moved > 0.05).all() and (moved <= 0.15 + 1e-6).all()
    clipped = replace(attack, clip=True)(model, images, labels)
    moved = torch.linalg.vector_norm((clipped - images).flatten(1), length, dim=1)
    assert (moved <= 0.05 + 1e-6).all()


def test_labels_may_be_probabilities_and_the_loss_a_function(digits):
    soft = digits._replace(labels=nn.functional.one_hot(digits.labels, 10).float())
    assert torch.equal(FGSM(epsilon=0.1)(*soft), FGSM(epsilon=0.1)(*digits))
    with pytest.raises(ValueError, match=r"labels: expected classes \(B,\)"):
        PGD(restarts=2)(*soft)

    def own(logits, labels):
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    assert torch.equal(BIM(loss=own)(*digits), BIM()(*digits))
