import numpy as np
import pytest
import torch
from PIL import Image

from robust_submission.models.resize_pad import RandomResizePad, image_keys

IMAGES = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_matches_an_independent_resize_and_pad():
    layer = RandomResizePad(32, 26)
    sides, tops, lefts = (values.tolist() for values in layer.sample(IMAGES))
    output = layer(IMAGES)
    for image, side, top, left, result in zip(IMAGES, sides, tops, lefts, output, strict=True):
        index = (np.arange(side) * 32 // side).astype(int)
        expected = np.zeros((3, 32, 32), np.float32)
        small = image.numpy()[:, index][:, :, index]
        expected[:, top : top + side, left : left + side] = small
        np.testing.assert_array_equal(result.numpy(), expected)


def test_nearest_matches_torch():
    for side in range(26, 32):
        index = torch.arange(side) * 32 // side
        nearest = torch.nn.functional.interpolate(IMAGES, size=side, mode="nearest")
        assert torch.equal(nearest, IMAGES[:, :, index][:, :, :, index])


def test_draws_cover_the_range_evenly():
    layer = RandomResizePad(32, 26)
    sides = list[int]()
    for draw in range(50):
        layer.draw = draw
        side, top, left = layer.sample(IMAGES)
        assert ((side >= 26) & (side <= 31)).all()
        assert ((top >= 0) & (top + side <= 32) & (left >= 0) & (left + side <= 32)).all()
        sides += side.tolist()
    counts = np.bincount(sides, minlength=32)[26:]
    assert (np.abs(counts / len(sides) - 1 / 6) < 0.03).all()  # 3 sigma at 3,200 draws is 0.02


def test_an_image_gets_its_draw_whatever_the_batch():
    layer = RandomResizePad(32, 26)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    whole = layer(IMAGES)
    assert torch.equal(layer(IMAGES[order]), whole[order])
    assert torch.equal(torch.cat([layer(part) for part in IMAGES.split(7)]), whole)


def test_draw_and_seed_change_the_output_and_come_back():
    layer = RandomResizePad(32, 26)
    first = layer(IMAGES)
    layer.draw = 1
    assert not torch.equal(layer(IMAGES), first)
    layer.draw = 0
    assert torch.equal(layer(IMAGES), first)
    assert not torch.equal(RandomResizePad(32, 26, seed=1)(IMAGES), first)


def test_one_changed_level_changes_the_key():
    changed = IMAGES.clone()
    changed[:, 0, 0, 0] = 1 - changed[:, 0, 0, 0].round()
    assert (image_keys(IMAGES, 0) != image_keys(changed, 0)).all()


def test_gradient_flows_to_the_pixels_that_remain():
    images = IMAGES.clone().requires_grad_()
    layer = RandomResizePad(32, 26)
    gradient = torch.autograd.grad(layer(images).sum(), images)[0]
    side = layer.sample(IMAGES)[0]
    assert torch.equal(gradient.sum((1, 2, 3)), (3 * side * side).float())


def test_agrees_with_pillow_on_a_solid_image():
    solid = torch.full((1, 3, 32, 32), 0.5)
    layer = RandomResizePad(32, 26)
    side = int(layer.sample(solid)[0])
    reference = Image.new("L", (32, 32), 255).resize((side, side), Image.Resampling.NEAREST)
    assert (layer(solid) > 0).sum() == 3 * np.count_nonzero(np.asarray(reference))


@pytest.mark.parametrize("min_size", [0, 32, 40])
def test_refuses_a_side_that_does_not_fit(min_size: int):
    with pytest.raises(ValueError, match=f"received min_size = {min_size}"):
        RandomResizePad(32, min_size)
