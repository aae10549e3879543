"""How often fooled images leave the batch: the same results, and how often the device is read."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from robust_submission.attacks import FMN, MIM, PGD, Attack, Screen, image_seeds
from robust_submission.attacks.early_stop import EVERY
from robust_submission.attacks.losses import cross_entropy
from robust_submission.attacks.trajectory import Trajectory

READING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


class Readings(TorchDispatchMode):
    """Counts the operations for which the CPU would have to wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        by_mask = any(each is not None and each.dtype == torch.bool for each in indices)
        self.count += by_mask or name in READING
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "attack",
    [
        PGD(epsilon=0.08, steps=12, early_stop=True),
        MIM(epsilon=0.08, steps=12, early_stop=True),
        PGD(norm="l2", epsilon=0.5, steps=7, restarts=3, decay=0.5, early_stop=True),
        PGD(epsilon=0.3, steps=9, targeted=True, early_stop=True),
        PGD(epsilon=1, steps=40, early_stop=True),  # fools every image on the way
        Screen(epsilon=0.1, early_stop=True),
    ],
)
def test_it_changes_no_result(digits, monkeypatch: pytest.MonkeyPatch, attack: Attack):
    precise, seeds = copy.deepcopy(digits.model).double(), image_seeds(0, range(100))
    seen = list[int]()

    def model(images: Tensor) -> Tensor:  # rounding in float32 differs by the batch
        seen.append(len(images))
        return precise(images.double())

    found, passes = list[Tensor](), list[int]()
    for every in (1, 5, 1000):
        monkeypatch.setitem(EVERY, "cpu", every)
        found.append(attack(model, digits.images, digits.labels, seeds=seeds))
        passes.append(sum(seen))
        seen.clear()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)
        assert torch.equal(digits.fooled(other), digits.fooled(found[0]))
    assert passes[0] < passes[1] < passes[2]


def test_the_device_is_read_only_when_images_may_leave(digits, monkeypatch: pytest.MonkeyPatch):
    attack = PGD(epsilon=0.01, steps=12, early_stop=True)
    for every, expected in ((1, 12), (5, 2), (1000, 0)):
        monkeypatch.setitem(EVERY, "cpu", every)
        with Readings() as readings:
            attack(*digits)
        assert readings.count == expected
    with Readings() as readings:
        FMN(steps=3)(*digits)
        PGD(steps=3, observe=Trajectory(digits.labels, cross_entropy))(*digits)
    assert readings.count == 0
