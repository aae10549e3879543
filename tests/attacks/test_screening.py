"""The screen against closed forms, and how its work is divided among images."""

import pytest
import torch
from torch import Tensor, nn

from robust_submission.attacks import AutoAttack, Screen, image_seeds


def linear(num_classes: int, seed: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A linear model, grey images near its decisions, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(192, num_classes)
    layer.weight.data = torch.randn(num_classes, 192, generator=generator)
    layer.weight.data *= torch.linspace(0.2, 1, num_classes)[:, None]  # far in logits, near in fact
    images = 0.4 + 0.2 * torch.rand(40, 3, 8, 8, generator=generator)
    layer.bias.data = -layer(images.flatten(1)).mean(0) + layer.bias.data
    return layer, images, layer(images.flatten(1)).argmax(1)


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize(("norm", "order", "epsilon"), [("linf", 1, 0.008), ("l2", 2, 0.08)])
@pytest.mark.parametrize("num_classes", [2, 3, 6])
def test_fools_a_linear_model_exactly_where_a_boundary_is_in_the_ball(
    num_classes: int, norm: str, order: int, epsilon: float, early_stop: bool
):
    layer, images, labels = linear(num_classes, seed=num_classes)
    attack = Screen(norm=norm, epsilon=epsilon, early_stop=early_stop)
    with torch.no_grad():
        found = attack(lambda images: layer(images.flatten(1)), images, labels)
        fooled = layer(found.flatten(1)).argmax(1) != labels
        logits, rows = layer(images.flatten(1)), torch.arange(len(images))
        gaps = logits[rows, labels, None] - logits
        reach = (layer.weight[labels, None] - layer.weight).norm(p=order, dim=2)
        distances = (gaps / reach.clamp_min(1e-9)).scatter(1, labels[:, None], torch.inf).amin(1)
    clear = (distances / epsilon - 1).abs() > 0.01  # the last steps stop so close to the best point
    expected = distances < epsilon
    assert torch.equal(fooled[clear], expected[clear])
    assert expected[clear].any() and not expected[clear].all()


def test_each_image_has_a_result_of_its_own(digits):
    model, images, labels = digits.first(12)
    seeds, attack = image_seeds(0, range(12)), Screen(epsilon=0.12, early_stop=True)
    together = attack(model, images, labels, seeds=seeds)
    for rows in (slice(0, 1), slice(3, 10)):
        alone = attack(model, images[rows], labels[rows], seeds=seeds[rows])
        torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=0)


def test_finds_what_autoattack_finds(many_digits):
    model, images, labels = many_digits.first(200)
    screen = Screen(epsilon=0.1, early_stop=True)(model, images, labels)
    full = AutoAttack(epsilon=0.1, attacks=("apgd-ce", "apgd-t"))(model, images, labels)
    robust = [
        1 - (model(each).argmax(1) != labels).float().mean().item() for each in (screen, full)
    ]
    assert abs(robust[0] - robust[1]) <= 0.005 and 0.1 < robust[1] < 0.9


@pytest.mark.parametrize(("slope", "whole"), [(1e-3, False), (1.0, True)])
def test_what_hardly_moves_is_given_up_and_a_near_miss_gets_every_run(slope: float, whole: bool):
    """The margin is a line in the pixels, with a tenth of it or almost all of it left."""
    counted = list[int]()

    def model(images: Tensor) -> Tensor:
        counted.append(1 + (torch.is_grad_enabled() and images.requires_grad))
        rise = slope * 9 * (images.flatten(1).mean(1) - 0.5)
        return torch.stack([rise, 1 - 0 * rise, -9 + rise, -9 - rise], dim=1)

    images = torch.full((1, 3, 8, 8), 0.5)
    attack = Screen(epsilon=0.1, early_stop=True)
    attack(model, images, torch.tensor([1]), seeds=torch.tensor([0]))
    assert (sum(counted) == attack.passes(4)) == whole
    assert whole or sum(counted) < attack.passes(4) / 4
