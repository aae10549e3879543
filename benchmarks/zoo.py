"""Does `evaluate` tell masking from robustness? It is tried on a zoo of small classifiers.

    python benchmarks/zoo.py --images data/raw/cifar10 --limit 30
    python benchmarks/zoo.py --images data/raw/cifar10 --only jpeg,pgd-8 --attacks fgsm,pgd
    python benchmarks/zoo.py --images data/raw/cifar10 --published true

One line per model: clean, oblivious and adaptive robust accuracy and the verdict as `evaluate`
finds them, beside the true robust accuracy at 8/255. Of a masked model that is what withstands
attacks that know the defence: PGD-50 and APGD-T on its twins, the worst case per image. Of an
honest one it is what withstands AutoAttack (APGD-CE, APGD-T, Square). Both are upper bounds. The
first run trains the networks, one to four minutes for each on one CPU core.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from robust_submission import evaluate
from robust_submission.attacks import PGD, Attack, AutoAttack, Model
from robust_submission.attacks.base import correct
from robust_submission.cli.command import Names, Ratio, run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write
from robust_submission.cli.numbers import percent
from robust_submission.report.schema import Report
from zoo_models import AROUND_ANY, HONEST, MASKED, Build, Row
from zoo_networks import DEVICE, Networks, read_images

COLUMNS = ("model", "clean", "oblivious", "adaptive", "true", "verdict", "planted", "seconds")
WIDTHS = (28, 6, 9, 8, 6, 18, 7, 7)
KINDS = {
    "masked": (MASKED, ("masked", "evaluation failed")),
    "honest": (HONEST, ("no sign of masking",)),
}
"""Rows of each kind, and the verdicts that are right for them."""
NOTHING_HIDDEN = 0.05
"""How far an oblivious accuracy may lie above the true one by chance."""
DRAWS = 5
"""Calls of a model that are scored, as it may be random."""


@dataclass(kw_only=True)
class Options:
    """What to try."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg."""
    limit: int = 30
    """Test images, drawn with the seed and stratified by class."""
    published: bool = False
    """Try a few of the rows around pyautoattack's natural ResNet-18 in place of a small network."""
    only: Names = Names()
    """Models by name; `masked` and `honest` stand for all of a kind. None for every model."""
    attacks: Names = Names("fgsm,pgd")
    """Of `evaluate`."""
    steps: int = 10
    """Of `evaluate`."""
    epsilon: Ratio = Ratio("8/255")
    """Radius in L-infinity."""
    curves: bool = True
    """Of `evaluate`: without them fewer checks are made."""
    true: bool = True
    """Find the true robust accuracy; without it `evaluate` alone runs."""
    weights: Path = Path("runs/zoo")
    """Folder of the trained networks; missing ones are trained."""
    out: Path | None = None
    """A file for the table, written anew after each model."""
    seed: int = 0
    """Of the images and of `evaluate`."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.only) - {"masked", "honest", *MASKED, *HONEST}):
            known = ", ".join([*MASKED, *HONEST])
            raise UserError(f"--only: expected some of {known}; found {unknown[0]!r}.")

    def chosen(self, kind: str, rows: dict[str, Row]) -> dict[str, Row]:
        """The rows of a kind that `only` and `published` ask for."""
        wanted = rows if not self.only or kind in self.only else self.only
        wanted = [name for name in wanted if not self.published or name in AROUND_ANY]
        return {name: row for name, row in rows.items() if name in wanted}


@dataclass(kw_only=True)
class TrueAccuracy:
    """Robust accuracy by attacks on twins, chosen by someone who knows the model."""

    networks: Networks
    images: Tensor
    """(N, 3, 32, 32), float32, 0 to 1."""
    labels: Tensor
    """(N,)."""
    found: dict[tuple[Build, Attack], Tensor] = field(default_factory=dict)
    """Adversarial images; many rows share the natural network's."""

    def of(self, model: Model, twins: Sequence[Build], attacks: Sequence[Attack]) -> float:
        """The share of images that withstand every attack on every twin."""
        withstood = self._withstood(model, self.images)
        for twin, attack in product(twins, attacks):
            withstood = torch.minimum(withstood, self._withstood(model, self._found(twin, attack)))
        return withstood.mean().item()

    def _found(self, twin: Build, attack: Attack) -> Tensor:
        if (twin, attack) not in self.found:
            seen = twin(self.networks)
            self.found[twin, attack] = attack(seen, self.images, self.labels)
        return self.found[twin, attack]

    @torch.no_grad()
    def _withstood(self, model: Model, images: Tensor) -> Tensor:
        """(N,): the share of a few calls that classify the image correctly."""
        calls = [correct(model(images).float(), self.labels) for _ in range(DRAWS)]
        return torch.stack(calls).float().mean(0)


def knowing_attacks(kind: str, epsilon: float) -> list[Attack]:
    """What the true robust accuracy is found with; PGD goes on beyond the twin's decision."""
    if kind == "honest":
        whole = ("apgd-ce", "apgd-t", "square")
        return [AutoAttack(epsilon=epsilon, attacks=whole, queries=1000)]
    pgd = PGD(epsilon=epsilon, steps=50, loss="margin")
    return [pgd, AutoAttack(epsilon=epsilon, attacks=("apgd-t",))]


def report_of(model: Model, truth: TrueAccuracy, options: Options, name: str) -> Report | Exception:
    """What `evaluate` finds, or what it raises."""
    try:
        return evaluate(
            model,
            truth.images,
            truth.labels,
            attacks=options.attacks,
            epsilon=options.epsilon,
            steps=options.steps,
            curves=options.curves,
            seed=options.seed,
            name=name,
        )
    except Exception as error:  # the row says so, and the next model follows
        return error


def cells_of(found: Report | Exception, true: float | None) -> list[str]:
    """The cells between the model's name and the seconds; an error in place of the verdict."""
    shown = "-" if true is None else percent(true)
    if isinstance(found, Exception):
        reason = (str(found).strip() or "no message").splitlines()[0]
        return ["-", "-", "-", shown, f"{type(found).__name__}: {reason}", "-"]
    shares = (found.clean, found.oblivious, found.adaptive)
    planted = found.planted and f"{found.planted.found.count:g} of {found.planted.found.total}"
    numbers = [percent(share.value) for share in shares]
    return [*numbers, shown, found.verdict, planted or "-"]


def line(cells: Sequence[str]) -> str:
    """One row of the table, in columns."""
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


@dataclass
class Tally:
    """How many models of a kind get a verdict that is right for them."""

    kind: str
    right: tuple[str, ...]
    models: int = 0
    called: int = 0
    open: int = 0
    """Models with another verdict whose oblivious accuracy is the true one: nothing is hidden."""

    def add(self, found: Report | Exception, true: float | None) -> None:
        """Count one model."""
        self.models += 1
        if isinstance(found, Exception):
            return
        called = found.verdict in self.right
        self.called += called
        if not called and self.kind == "masked" and true is not None:
            self.open += found.oblivious.value <= true + NOTHING_HIDDEN

    def __str__(self) -> str:
        text = f"{self.called} of {self.models} {self.kind} ones called {' or '.join(self.right)}"
        return f"{text} ({self.open} of the others hide nothing)" if self.open else text


def try_zoo(options: Options) -> None:
    """Evaluate every model and print the table."""
    networks = Networks(options.images, options.weights, options.published)
    pixels, labels = read_images(options.images, "test", options.limit, options.seed)
    truth = TrueAccuracy(
        networks=networks, images=pixels.to(DEVICE).float() / 255, labels=labels.to(DEVICE)
    )
    lines, tallies = [line(COLUMNS)], list[Tally]()
    print(lines[0], flush=True)
    for kind, (rows, right) in KINDS.items():
        attacks = knowing_attacks(kind, options.epsilon)
        tallies.append(Tally(kind, right))
        for name, row in options.chosen(kind, rows).items():
            torch.manual_seed(options.seed)
            model = row.build(networks)
            start = time.perf_counter()
            found = report_of(model, truth, options, name)
            seconds = f"{time.perf_counter() - start:.0f}"
            true = truth.of(model, row.twins, attacks) if options.true else None
            tallies[-1].add(found, true)
            lines.append(line([name, *cells_of(found, true), seconds]))
            print(lines[-1], flush=True)
            write(options.out, lines)
    lines.append("; ".join(map(str, tallies)) + ".")
    print(lines[-1])
    write(options.out, lines)


def write(out: Path | None, lines: Sequence[str]) -> None:
    """Write the table so far."""
    if out:
        with atomic_write(out) as temporary:
            temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(try_zoo, Options)
