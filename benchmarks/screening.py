"""How much faster is `screen` than AutoAttack, and how much does it miss?

    python benchmarks/screening.py --images data/raw/cifar10 --networks natural-16,fgsm-16
    python benchmarks/screening.py --images data/raw/cifar10 --checkpoint runs/cifar10_fast

Both attack the same images of an honest model in turn, one batch of all that it classifies
correctly, and are scored on it. A forward pass of one image counts one, a backward pass as much. On
a CPU time is the process's own, so that other work does not count.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from robust_submission.attacks import Attack, Model, build_attack, image_seeds
from robust_submission.attacks.base import correct
from robust_submission.cli.command import Names, Ratio, run
from robust_submission.evaluation.results import share_of
from robust_submission.models.load import load_checkpoint
from timing import DEVICE, ON_CPU, print_table, take_turns, times_as_fast
from zoo_networks import Networks, read_images

COLUMNS = (
    *("model", "norm", "images", "clean", "AutoAttack", "screen", "points apart (95 %)"),
    *("passes, times fewer", "time, times as fast"),
)


@dataclass(kw_only=True)
class Options:
    """What to attack."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg."""
    networks: Names = Names()
    """Networks of the zoo; missing ones are trained."""
    checkpoint: Path | None = None
    """A run folder of an adversarially trained classifier of 32 px, without GCM."""
    limit: int = 200
    """Test images, drawn with the seed and stratified by class."""
    norm: str = "linf"
    """linf or l2."""
    epsilon: Ratio = Ratio("8/255")
    """Radius in that norm."""
    seed: int = 0
    """Of the images and of the attacks."""
    weights: Path = Path("runs/zoo")
    """Folder of the zoo's networks."""


class Counted:
    """A model that counts its passes."""

    def __init__(self, model: Model) -> None:
        self.model, self.passes = model, 0

    def __call__(self, images: Tensor) -> Tensor:
        backward = torch.is_grad_enabled() and images.requires_grad
        self.passes += len(images) * (2 if backward else 1)
        return self.model(images)


def models(options: Options) -> Iterator[tuple[str, Model]]:
    """The models by name."""
    for name in options.networks:
        yield name, Networks(options.images, options.weights)(name)
    if options.checkpoint:
        yield options.checkpoint.name, load_checkpoint(options.checkpoint).eval().to(DEVICE)


def row(name: str, model: Model, options: Options) -> list[str]:
    """Attack one model with both, and compare them."""
    pixels, labels = read_images(options.images, "test", options.limit, options.seed)
    images, labels = pixels.to(DEVICE).float() / 255, labels.to(DEVICE)
    seeds = image_seeds(options.seed, range(len(images)))
    right = is_correct(model, images, labels)
    batch, robust = (images[right], labels[right]), dict[str, Tensor]()
    counted = {each: Counted(model) for each in ("autoattack", "screen")}

    def attack(each: str) -> None:
        early_stop = {"early_stop": True} if each == "screen" else {}  # AutoAttack always stops
        method: Attack = build_attack(each, options.epsilon, options.norm, **early_stop)
        found = method(counted[each], *batch, seeds=seeds[right.cpu()])
        robust[each] = is_correct(model, found, batch[1])

    turns = {each: partial(attack, each) for each in counted}
    clock = time.process_time if ON_CPU else time.perf_counter
    seconds = take_turns(turns, rounds=1, warm_up=0, clock=clock)
    full, screen = robust["autoattack"], robust["screen"]
    missed, alone = int((screen & ~full).sum()), int((full & ~screen).sum())
    most = share_of(missed, len(images)).high
    passes = counted["autoattack"].passes / counted["screen"].passes
    return [
        *(name, options.norm, str(len(images))),
        *(str(int(each.sum())) for each in (right, full, screen)),
        f"{100 * (missed - alone) / len(images):+.1f} (at most {100 * most:.1f} missed)",
        f"{passes:.1f}",
        times_as_fast(seconds, "screen", "autoattack").partition(" ")[0],
    ]


@torch.no_grad()
def is_correct(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool."""
    return correct(model(images).float(), labels)


def compare(options: Options) -> None:
    """Print the table."""
    print_table(COLUMNS, [row(name, model, options) for name, model in models(options)])


if __name__ == "__main__":
    run(compare, Options)
