"""The distances of FMN and DDN against closed forms and foolbox's, and what the images hold."""

import pytest
import torch
from torch import Tensor

from robust_submission.attacks import DDN, FMN, NORMS, build_attack
from robust_submission.attacks.minimum_norm import DUAL, MinimumNorm

ATTACKS = [FMN(norm="linf"), FMN(norm="l1", epsilon=96), FMN(norm="l1-dense", epsilon=96), DDN()]
PEERS = {"linf": "LInfFMNAttack", "l1": "L1FMNAttack", "l1-dense": "L1FMNAttack", "l2": "DDNAttack"}
each = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.norm)


@each
def test_the_distance_to_a_plane(attack: MinimumNorm):
    """In any norm the margin over the dual norm of the weights, where no pixel meets a wall.

    A class that the model never chooses does not matter.
    """
    weights = torch.linspace(-1, 1, 192).view(3, 8, 8) ** 3
    images = 0.5 + 0.1 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def model(images: Tensor) -> Tensor:
        score = 30 * (images * weights).sum(dim=(1, 2, 3))
        never = torch.full_like(score, -torch.inf)
        return torch.stack([score, torch.zeros_like(score), never], dim=1)

    margins = model(images)[:, 0]
    labels = (margins < 0).long()
    expected = margins.abs() / (30 * DUAL[attack.norm].size(weights[None]))
    found = attack.nearest(model, images, labels).distances
    assert (found >= expected * (1 - 1e-4)).all() and (found <= expected * 1.02).all()


@each
def test_as_near_as_foolbox(many_digits, attack: MinimumNorm):
    import foolbox

    model, images, labels = many_digits.first(100)
    right = ~many_digits.first(100).fooled(images)
    longest = {"max_stepsize": 10.0} if attack.norm == "linf" else {}
    peer = getattr(foolbox.attacks, PEERS[attack.norm])(steps=100, **longest)
    subject = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs = peer.run(subject, images, foolbox.Misclassification(labels))
    expected = NORMS[attack.norm].size(theirs - images)
    found = attack.nearest(model, images, labels).distances
    assert found.isfinite().all()
    both = right & (expected > 0)  # its L1 attack finds none where walls of the box are in the way
    found, expected = found[both], expected[both]
    assert found.median() <= 1.03 * expected.median()
    assert (found <= 1.15 * expected).float().mean() > 0.9


@each
def test_the_images_fool_at_their_distances(digits, attack: MinimumNorm):
    nearest = attack.nearest(*digits)
    assert nearest.images.min() >= 0 and nearest.images.max() <= 1
    moved = NORMS[attack.norm].size(nearest.images - digits.images)
    torch.testing.assert_close(moved, nearest.distances)
    assert digits.fooled(nearest.images).all()
    assert (nearest.distances == 0).eq(digits.fooled(digits.images)).all()
    assert torch.equal(attack(*digits), nearest.images)
    alone = attack.nearest(digits.model, digits.images[7:8], digits.labels[7:8])
    torch.testing.assert_close(alone.distances, nearest.distances[7:8], rtol=1e-3, atol=0)


def test_one_step_would_look_at_the_image_alone():
    with pytest.raises(ValueError, match="steps: expected at least 2"):
        FMN(steps=1)


@pytest.mark.parametrize("name", ["fmn", "ddn"])
def test_beyond_epsilon_nothing_is_found(digits, name: str):
    near = build_attack(name, 1e-4)
    assert isinstance(near, MinimumNorm)
    found = near.nearest(*digits)
    clean = digits.fooled(digits.images)
    assert (found.distances.isinf() == ~clean).all()
    assert torch.equal(found.images, digits.images)
