"""EOT, the worst case over several attacks, and what importing them loads."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from robust_submission.attacks import (
    EOT,
    FGSM,
    PGD,
    AutoAttack,
    UniformNoise,
    WorstCase,
    image_seeds,
)


class Shaken(nn.Module):
    """Logits of a linear model whose weights a draw changes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(5, 48, 4, generator=generator)
        self.draw = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 0.3 * images.flatten(1) @ self.weights[self.draw]

    def set_draw(self, draw: int) -> None:
        self.draw = draw


def test_eot_is_the_log_of_the_average_probability_and_its_gradient():
    model = Shaken()
    images = torch.rand(6, 3, 4, 4, requires_grad=True)
    labels = torch.arange(6) % 4
    outputs = EOT(model, range(5), model.set_draw)(images)
    probabilities = torch.stack(
        [(0.3 * images.flatten(1) @ weight).softmax(1) for weight in model.weights]
    ).mean(0)
    torch.testing.assert_close(outputs.exp(), probabilities)
    loss = nn.functional.cross_entropy(outputs, labels, reduction="sum")
    torch.testing.assert_close(loss, -probabilities[range(6), labels].log().sum())
    (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
    (expected,) = torch.autograd.grad(-probabilities[range(6), labels].log().sum(), images)
    torch.testing.assert_close(gradient, expected)


def test_eot_makes_an_attack_that_carries_over_to_other_draws():
    model, images = Shaken(), torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    average = EOT(model, range(5), model.set_draw)
    labels = average(images).argmax(1)
    attack = PGD(epsilon=0.1, random_start=False)
    model.draw = 0
    one = attack(model, images, labels)
    many = attack(average, images, labels)
    assert (average(many).argmax(1) == labels).float().mean() < (
        (average(one).argmax(1) == labels).float().mean() - 0.1
    )


def test_eot_is_finite_where_probabilities_vanish():
    def sharp(images):
        return 1e4 * torch.stack([images.sum((1, 2, 3)), -images.sum((1, 2, 3))], dim=1)

    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    outputs = EOT(sharp, [0, 1], lambda draw: None)(images)
    assert outputs.isfinite().all()
    assert torch.autograd.grad(outputs[:, 1].sum(), images)[0].isfinite().all()
    with pytest.raises(ValueError, match="draws: expected at least one"):
        EOT(sharp, [], lambda draw: None)


def test_worst_case_is_the_worst_of_its_attacks_and_names_the_one(digits):
    attacks = {
        "fgsm": FGSM(epsilon=0.06),
        "pgd": PGD(epsilon=0.07),
        "noise": UniformNoise(epsilon=0.1),  # after stronger ones: what it tries is not kept
    }
    seeds = image_seeds(0, range(100))
    result = WorstCase(attacks=attacks).run(*digits, seeds=seeds)
    alone = {"clean": digits.images}
    alone |= {name: attack(*digits, seeds=seeds) for name, attack in attacks.items()}
    fooled = {name: digits.fooled(images) for name, images in alone.items()}
    expected = [next((name for name in fooled if fooled[name][row]), "") for row in range(100)]
    assert result.fooled_by == expected
    assert {"", "clean", "fgsm", "pgd"} <= set(expected)
    robust = ~digits.fooled(result.images)
    assert torch.equal(robust, result.robust)
    losses = digits.losses(result.images)
    torch.testing.assert_close(losses, result.losses)
    largest = torch.stack([digits.losses(images) for images in alone.values()]).amax(0)
    torch.testing.assert_close(losses[robust], largest[robust], atol=1e-4, rtol=1e-4)
    wrong = fooled["clean"]
    assert torch.equal(result.images[wrong], digits.images[wrong])


def test_images_whose_decision_is_clear_get_no_more_draws():
    """Probabilities 0.9, 0.1 in every draw are clear; 0.9 and 0.2 in turns (t = 0.25) are not."""
    drawn = list[int]()
    pairs = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.9, 0.1], [0.2, 0.8]]])  # (B, 2 draws, C)

    def model(images):
        drawn.append(len(images))
        return pairs[images[:, 0, 0, 0].long(), (len(drawn) - 1) % 2].log()

    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    outputs = EOT(model, range(8), lambda draw: None, enough=4)(images)
    assert drawn == [2, 2, 2, 2, 1, 1, 1, 1]
    torch.testing.assert_close(outputs.exp(), torch.tensor([[0.9, 0.1], [0.55, 0.45]]))
    with pytest.raises(ValueError, match="enough: expected at least 2"):
        EOT(model, range(8), lambda draw: None, enough=1)


def test_worst_case_shows_an_attack_only_the_survivors(digits):
    seen = {}

    def recorded(name, attack):
        def call(model, images, labels, generator=None, *, seeds=None):
            seen[name] = images, labels, seeds
            return attack(model, images, labels, generator, seeds=seeds)

        return call

    first, second = FGSM(epsilon=0.06), PGD(epsilon=0.06)
    worst = WorstCase(attacks={"a": recorded("a", first), "b": recorded("b", second)})
    seeds = image_seeds(0, range(100))
    right = ~digits.fooled(digits.images)
    worst(*digits, seeds=seeds)
    for name, rows in (("a", right), ("b", right & ~digits.fooled(first(*digits)))):
        images, labels, handed = seen[name]
        assert torch.equal(images, digits.images[rows]) and 0 < rows.sum() < 100
        assert torch.equal(labels, digits.labels[rows]) and torch.equal(handed, seeds[rows])


def test_worst_case_can_be_scored_on_another_model(digits):
    def masked(images):  # its gradient is 0
        return digits.model(images) * 0 + digits.model(images.detach())

    worst, masked_digits = (
        WorstCase(attacks={"fgsm": FGSM(epsilon=0.08)}),
        digits._replace(model=masked),
    )
    adaptive = worst.run(*digits, scored_on=masked).fooled_by
    assert adaptive == worst.run(*digits).fooled_by and "fgsm" in adaptive
    assert "fgsm" not in worst.run(*masked_digits).fooled_by


def test_worst_case_of_standard_attacks_is_autoattack(digits):
    """AutoAttack is itself a worst case: its parts, composed by us, leave the same images."""
    some, parts = digits.first(20), ("apgd-ce", "apgd-t")
    whole = AutoAttack(epsilon=0.08, attacks=parts)(*some)
    ours = WorstCase(attacks={part: AutoAttack(epsilon=0.08, attacks=(part,)) for part in parts})
    assert torch.equal(~some.fooled(whole), ours.run(*some).robust)


def test_worst_case_refuses_nothing_and_targets():
    with pytest.raises(ValueError, match="attacks: expected at least one"):
        WorstCase(attacks={})
    with pytest.raises(ValueError, match="untargeted"):
        WorstCase(attacks={"pgd": PGD(targeted=True)})


def test_the_attacks_import_no_slow_library():
    code = (
        "import sys, robust_submission.attacks; print({'pyautoattack', 'foolbox'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
