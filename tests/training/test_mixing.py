import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_submission.training.objectives import Mixing

IMAGES = torch.rand(64, 3, 12, 20, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 10
SEEDS = torch.arange(64) * 7919
MIXING = Mixing()


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(720, 10))


def all_of(images: Tensor, labels: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
    draws = MIXING.draw(seeds)
    mixed, cut = MIXING.mixup(images, draws), MIXING.cutmix(images, draws)
    return *mixed, *cut, MIXING.fgsm(linear(), images, labels, draws)


@pytest.mark.parametrize("size", [2, 16, 32])
def test_the_examples_do_not_depend_on_how_the_batch_is_cut(size: int):
    cut = zip(IMAGES.split(size), LABELS.split(size), SEEDS.split(size), strict=True)
    parts = [all_of(*part) for part in cut]
    for whole, pieces in zip(all_of(IMAGES, LABELS, SEEDS), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))


def test_mixup_is_a_weighted_mean_of_neighbours():
    draws = MIXING.draw(SEEDS)
    mixed, share = MIXING.mixup(IMAGES, draws)
    images, share = IMAGES.numpy(), share.numpy()
    for place in range(64):
        expected = share[place] * images[place] + (1 - share[place]) * images[place ^ 1]
        np.testing.assert_allclose(mixed[place], expected, atol=1e-6)
    assert 0.4 < share.mean() < 0.6 and share.min() < 0.1 and share.max() > 0.9  # uniform


def test_cutmix_is_a_box_of_the_neighbour():
    draws = MIXING.draw(SEEDS)
    mixed, share = MIXING.cutmix(IMAGES, draws)
    foreign = (mixed != IMAGES).all(1).numpy()  # (B, H, W)
    for place in range(64):
        rows, columns = foreign[place].any(1).nonzero()[0], foreign[place].any(0).nonzero()[0]
        if len(rows):
            top, left = rows[0], columns[0]
            box = (slice(top, rows[-1] + 1), slice(left, columns[-1] + 1))
            assert foreign[place][box].all()
            assert torch.equal(mixed[place][:, *box], IMAGES[place ^ 1][:, *box])
        assert share[place] == pytest.approx(1 - foreign[place].mean(), abs=1e-6)
    assert (share >= draws.cutmix - 1e-6).all()  # the border only makes the box smaller
    assert 0.4 < share.mean() < 0.8


def test_each_image_is_attacked_within_a_radius_of_its_own():
    images = 0.2 + 0.6 * IMAGES  # no border in reach
    draws = MIXING.draw(SEEDS)
    moved = MIXING.fgsm(linear(), images, LABELS, draws) - images
    radius = (0.001 + 0.079 * draws.radius).view(-1, 1, 1, 1)
    torch.testing.assert_close(moved.abs(), radius.expand_as(moved), rtol=0, atol=1e-6)
    assert draws.radius.min() < 0.1 and draws.radius.max() > 0.9
    assert MIXING.fgsm(linear(), IMAGES, LABELS, draws).max() <= 1


@pytest.mark.parametrize(
    ("alphas", "probability", "shares"),
    [
        ((1.0, 1.0), 0.8, (0.4, 0.4)),
        ((1.0, 0.0), 0.5, (0.5, 0.0)),
        ((0.0, 1.0), 1.0, (0.0, 1.0)),
        ((0.0, 0.0), 1.0, (0.0, 0.0)),
    ],
)
def test_either_mixes_by_one_of_the_two(
    alphas: tuple[float, float], probability: float, shares: tuple[float, float]
):
    mixing = Mixing(mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    images, seeds = IMAGES.repeat(16, 1, 1, 1), torch.arange(1024)
    draws = mixing.draw(seeds)
    mixed, share = mixing.either(images, draws, probability)
    by_mixup, by_cutmix = mixing.mixup(images, draws), mixing.cutmix(images, draws)
    counts = [0, 0]
    for place in range(1024):
        kinds = [
            torch.equal(mixed[place], made[place]) and share[place] == own[place]
            for made, own in (by_mixup, by_cutmix)
        ]
        changed = not torch.equal(mixed[place], images[place])
        assert any(kinds) if changed else share[place] == 1
        counts = [count + (kind and changed) for count, kind in zip(counts, kinds, strict=True)]
    np.testing.assert_allclose(np.array(counts) / 1024, shares, atol=0.06)


def test_an_odd_image_has_no_partner():
    with pytest.raises(ValueError, match="batch_size: expected an even number of images"):
        MIXING.partners(torch.zeros(3))
