"""C&W and AutoAttack through their libraries, and our attacks against foolbox's."""

import logging
import sys

import pytest
import torch
from torch import nn

from robust_submission.attacks import NORMS, AutoAttack, CarliniWagner, build_attack, image_seeds


@pytest.mark.parametrize(
    ("name", "rival", "norm", "epsilon"),
    [
        ("fgsm", "LinfFastGradientAttack", "linf", 0.1),
        ("fgsm", "L2FastGradientAttack", "l2", 0.8),
        ("bim", "LinfBasicIterativeAttack", "linf", 0.1),
        ("bim", "L2BasicIterativeAttack", "l2", 0.6),
        ("bim", "L1BasicIterativeAttack", "l1-dense", 4.0),
        ("pgd", "LinfPGD", "linf", 0.1),
        ("pgd", "L2PGD", "l2", 0.6),
        ("pgd", "SparseL1DescentAttack", "l1", 2.0),
    ],
)
def test_agrees_with_foolbox_within_one_point(many_digits, name, rival, norm, epsilon):
    import foolbox

    model, images, labels = many_digits
    ours = {"step_size": epsilon / 4, "steps": 10} if name != "fgsm" else {}
    theirs = {"abs_stepsize": epsilon / 4, "steps": 10} if name != "fgsm" else {}
    if rival == "SparseL1DescentAttack":
        theirs["random_start"] = True
    subject = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attack = getattr(foolbox.attacks, rival)(**theirs)
        _, expected, _ = attack(subject, images, labels, epsilons=epsilon)
    found = build_attack(name, epsilon, norm, **ours)(*many_digits)
    clean, rivals, own = (many_digits.accuracy(each) for each in (images, expected, found))
    assert clean - rivals > 0.1
    if norm == "l1-dense":  # foolbox scales points back into the ball, we take the nearest one
        assert own < rivals
        return
    assert abs(own - rivals) < 0.01
    if name != "pgd":  # not random: the same images, except where rounding crosses a kink
        apart = (found - expected).abs().amax(dim=(1, 2, 3))
        assert (apart < 1e-5).float().mean() > 0.99


def test_carlini_wagner_finds_the_nearest_point_beyond_a_plane():
    """On a linear model the least perturbation is the distance to the plane."""

    class Plane(nn.Module):
        def forward(self, images):
            score = (images[:, 0] - 0.5).flatten(1).sum(1)
            return torch.stack([torch.zeros_like(score), score], dim=1)

    images = torch.full((2, 3, 4, 4), 0.6)
    images[1] = 0.3
    labels = torch.tensor([1, 0])
    attack = CarliniWagner(epsilon=5, steps=300, binary_search_steps=6)
    found = attack(Plane(), images, labels)
    distances = NORMS["l2"].size(found - images)
    exact = torch.tensor([0.1, 0.2]) * 4  # 16 pixels of one channel
    assert (distances >= exact - 1e-3).all() and (distances <= exact * 1.05).all()
    assert (Plane()(found).argmax(1) != labels).all()
    near = CarliniWagner(epsilon=0.5, steps=300, binary_search_steps=6)(Plane(), images, labels)
    assert (Plane()(near).argmax(1) != labels).tolist() == [True, False]
    assert (NORMS["l2"].size(near - images) <= 0.5 * (1 + 1e-6)).all()


def test_carlini_wagner_attacks_each_image_alone(digits):
    attack = CarliniWagner(epsilon=8, steps=40, binary_search_steps=3)
    model, images, labels = digits.first(6)
    together = attack(model, images, labels)
    for row in range(6):
        alone = attack(model, images[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-3, rtol=0)


def test_carlini_wagner_reaches_its_target(digits):
    targets = digits._replace(labels=(digits.labels + 1) % 10).first(20)
    attack = CarliniWagner(epsilon=8, steps=60, targeted=True)
    assert targets.accuracy(attack(*targets)) > 0.9


@pytest.mark.parametrize(
    "attack",
    [CarliniWagner(steps=3), AutoAttack(attacks=("apgd-ce", "fab-t"))],
    ids=["cw", "autoattack"],
)
def test_an_image_that_cannot_be_fooled_is_returned_unchanged(digits, attack):
    def constant(images):
        return torch.eye(10)[0] + 0 * images.flatten(1)[:, :1]

    labels = torch.zeros(3, dtype=torch.long)
    assert torch.equal(attack(constant, digits.images[:3], labels), digits.images[:3])


@pytest.mark.parametrize("num_classes", [2, 3, 4, 6])
def test_autoattack_with_few_classes(num_classes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(300, num_classes))
    images = torch.rand(12, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    images = 0.2 + 0.6 * images  # no wall is reached
    labels = model(images).argmax(1)
    found = AutoAttack(epsilon=0.1, queries=50)(model, images, labels)
    fooled = model(found).argmax(1) != labels
    # A linear model is fooled where some margin is below epsilon times its weights' L1 norm.
    weight, logits = model[1].weight, model(images)
    rows = torch.arange(len(images))
    slack = (logits[rows, labels, None] - logits) - 0.1 * (weight[labels, None] - weight).abs().sum(
        2
    )
    expected = slack.scatter(1, labels[:, None], torch.inf).amin(1) < 0
    assert torch.equal(fooled, expected) and expected.any()


def test_autoattack_calls_the_model_with_no_image_alone():
    def model(images):
        assert len(images) > 1
        score = (images - 0.5).mean(dim=(1, 2, 3))
        return torch.stack([-score, score], dim=1)

    images = torch.tensor([0.55, 0.9])[:, None, None, None].expand(2, 3, 4, 4)
    found = AutoAttack(epsilon=0.1, queries=20)(model, images, torch.tensor([1, 1]))
    assert model(found).argmax(1).tolist() == [0, 1]  # 0.05 and 0.4 from the decision


def test_autoattack_is_quiet_seeded_and_keeps_the_tracer(digits, capfd, caplog):
    def random_model(images):  # pyautoattack warns of such a model
        return digits.model(images + 0.01 * torch.rand_like(images)).softmax(1)

    def tracer(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with caplog.at_level(logging.DEBUG):
            AutoAttack(attacks=("apgd-ce",))(random_model, digits.images[:4], digits.labels[:4])
        kept = sys.gettrace()
    finally:
        sys.settrace(before)
    assert kept is tracer
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")
    attack, batch = AutoAttack(attacks=("square",), epsilon=0.1, queries=30), digits.first(30)
    generators = [{"generator": torch.Generator().manual_seed(seed)} for seed in (1, 1, 2)]
    seeds = [{"seeds": image_seeds(seed, range(30))} for seed in (1, 1, 2)]
    for sources in (generators, seeds):
        first, same, other = (attack(*batch, **source) for source in sources)
        assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_autoattack_returns_no_nan_where_gradients_are_wild(digits, norm):
    class Wild(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images):
            return images.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient * 1e25
            gradient[:, 0, ::2], gradient[:, 1, ::3] = torch.nan, torch.inf
            return gradient

    attack = AutoAttack(norm=norm, epsilon=0.5, attacks=("apgd-ce", "apgd-t", "fab-t"))
    found = attack(
        lambda images: digits.model(Wild.apply(images)), digits.images[:8], digits.labels[:8]
    )
    assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize(
    ("name", "norm", "options"),
    [
        ("noise", "linf", {}),
        ("fgsm", "l2", {}),
        ("pgd", "l1", {"steps": 7, "restarts": 2}),
        ("cw", "l2", {"steps": 6, "binary_search_steps": 2}),
        ("apgd-ce", "linf", {}),
        ("apgd-t", "l2", {}),
        ("apgd-dlr", "l1", {}),
        ("fab-t", "linf", {}),
        ("square", "linf", {"queries": 300}),
    ],
)
def test_an_attack_in_vain_costs_as_many_passes_as_it_says(name, norm, options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4))
    network.requires_grad_(False)
    first, counted = torch.tensor([9.0, 0, 0, 0]), list[int]()

    def model(images):
        backward = torch.is_grad_enabled() and images.requires_grad
        counted.append(len(images) * (2 if backward else 1))
        return 0.01 * network(images) + first

    attack = build_attack(name, 0.1, norm, **options)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    attack(model, images, torch.zeros(2, dtype=torch.int64), seeds=image_seeds(0, [0, 1]))
    expected, exact = 2 * attack.passes(4), not isinstance(attack, AutoAttack)
    assert sum(counted) == expected if exact else 0.9 < sum(counted) / expected < 1.1
