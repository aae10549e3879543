"""What does TRN restore, and what is left of it once the attacker knows of it?

    python benchmarks/trn_table.py --checkpoint runs/cifar10 --trn runs/cifar10_trn \\
        --out table.md --limit 1000 --adaptive_limit 200

Like the tables of arXiv 2202.01117: FGSM, FFGSM, BIM, PGD and MIM in L-infinity by an attacker who
knows the classifier and not the TRN, scored without and with it. An image counts as right if it is
so without the attack too. Counted in any case, TRN can pass the clean accuracy: an attack moves an
image away from its label, which thereby can be read from it (label leaking, Kurakin et al. 2017);
a column of its own shows how far. The last columns are of attackers who know of TRN: one
differentiates through TRN and its gradient map (second order), one passes the gradient straight
through; an image counts as fooled at any step of either.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robust_submission.attacks import Attack, build_attack, image_seeds
from robust_submission.attacks.base import correct
from robust_submission.cli.command import Ratio, run
from robust_submission.cli.files import atomic_write, check_writable
from robust_submission.data.dataset import ImageDataset
from robust_submission.data.loader import EvaluationLoader, micro_batches
from robust_submission.evaluation.data import DataOptions, open_evaluation_data
from robust_submission.evaluation.results import share_of
from robust_submission.models.classifier import RobustClassifier, reveal, undefended
from robust_submission.models.load import load_restoring

ATTACKS = ("fgsm", "ffgsm", "bim", "pgd", "mim")
_ITERATIVE = ("bim", "pgd", "mim")


@dataclass(kw_only=True)
class Options:
    """A table."""

    out: Path
    """The table, in Markdown."""
    checkpoint: Path | None = None
    """Run folder of the classifier."""
    model: str | None = None
    """Instead of a checkpoint: package.module:function, or path/file.py:function, that gives a
    RobustClassifier."""
    trn: Path | None = None
    """Run folder of the TRN."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images; by default the test images of the run."""
    limit: int = 1000
    """Images, drawn with the seed and stratified by class."""
    adaptive_limit: int = 200
    """How many of them, stratified too, those who know of TRN attack; 0 leaves them out."""
    epsilon: Ratio = Ratio("8/255")
    """Radius in L-infinity, in pixel values from 0 to 1."""
    steps: int = 10
    """Steps of bim, pgd and mim."""
    seed: int = 0
    """Of images and random starts."""

    def __post_init__(self) -> None:
        if min(self.limit, self.steps) < 1 or self.adaptive_limit < 0 or not 0 < self.epsilon <= 1:
            raise ValueError(
                "expected --limit and --steps of at least 1, --adaptive_limit of at least 0 and "
                f"--epsilon above 0, at most 1; found {self.limit}, {self.steps}, "
                f"{self.adaptive_limit} and {self.epsilon:g}."
            )


@dataclass
class Counts:
    """Images that stay right, by column, and how many there were."""

    right: dict[str, int]
    total: dict[str, int]

    def add(self, column: str, right: Tensor) -> None:
        """Count a batch; `right` is bool (n,)."""
        self.right[column] = self.right.get(column, 0) + int(right.sum())
        self.total[column] = self.total.get(column, 0) + len(right)

    def cell(self, column: str) -> str:
        """`62.1 [59.0, 65.1]`, percent with its 95 % interval; a dash where nothing was counted."""
        if column not in self.total:
            return "-"
        value = share_of(self.right[column], self.total[column])
        return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


COLUMNS = {
    "alone": "classifier alone",
    "restored": "with TRN, transfer",
    "leaked": "the same, all images counted",
    "adaptive": "with TRN, adaptive",
    "adaptive-bpda": "with TRN, adaptive-bpda",
    "worst": "with TRN, worst of both",
}


@torch.no_grad()
def is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool."""
    return correct(model(images), labels)


def build(name: str, options: Options, early_stop: bool) -> Attack:
    """One of `ATTACKS`."""
    settings = {"steps": options.steps, "early_stop": early_stop} if name in _ITERATIVE else {}
    return build_attack(name, options.epsilon, "linf", **settings)


def measure(
    model: RobustClassifier, name: str, options: Options, batches: Iterator[tuple[Tensor, ...]]
) -> Counts:
    """One row of the table."""
    twin, counts, place = undefended(model), Counts({}, {}), 0
    views = {"adaptive": reveal(model), "adaptive-bpda": reveal(model, bypass=True)}
    for images, labels, indices in batches:
        seeds = image_seeds(options.seed, indices)
        attacked = build(name, options, False)(twin, images, labels, seeds=seeds)
        clean, restored = is_right(model, images, labels), is_right(model, attacked, labels)
        alone = is_right(twin, images, labels) & is_right(twin, attacked, labels)
        counts.add("alone", alone)
        counts.add("restored", clean & restored)
        counts.add("leaked", restored)
        worst = clean[: max(0, options.adaptive_limit - place)]
        place += len(labels)
        if len(worst) == 0:
            continue
        some = worst.nonzero().squeeze(1)  # what is wrong when clean is not attacked
        for column, view in views.items():
            survives = torch.zeros_like(worst)
            attack = build(name, options, True)
            found = attack(view, images[some], labels[some], seeds=seeds[some])
            survives[some] = is_right(model, found, labels[some])
            worst = worst & survives
            counts.add(column, survives)
        counts.add("worst", worst)
    return counts


def make_table(options: Options) -> None:
    """Measure and write the table, again after each attack."""
    check_writable(options.out)
    name, model = load_restoring(options.checkpoint, options.model, options.trn)
    first = max(1, options.adaptive_limit)
    data = open_evaluation_data(
        options.data, options.checkpoint, options.limit, first, options.seed
    )

    def batches(description: str) -> Iterator[tuple[Tensor, ...]]:
        dataset = ImageDataset(data.source, data.indices, model.image_size)
        loader = EvaluationLoader(dataset, batch_size=64, num_workers=0)
        total = loader.num_micro_batches
        for batch in tqdm(micro_batches(loader), total=total, desc=description):
            count = batch["count"]
            yield batch["images"][:count], batch["labels"][:count], batch["indices"][:count]

    clean = Counts({}, {})
    for images, labels, _ in batches("clean"):
        clean.add("alone", is_right(undefended(model), images, labels))
        clean.add("restored", is_right(model, images, labels))
    lines = [
        f"{name}, {len(data.indices)} images ({min(options.adaptive_limit, len(data.indices))} of "
        f"them for adaptive attackers), seed {options.seed}, Linf {options.epsilon * 255:g}/255.",
        "",
        "| accuracy in %, 95 % interval | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
        "| clean | " + " | ".join(clean.cell(column) for column in COLUMNS) + " |",
    ]
    for attack in ATTACKS:
        counts = measure(model, attack, options, batches(attack))
        title = f"{attack.upper()}-{options.steps}" if attack in _ITERATIVE else attack.upper()
        lines.append(f"| {title} | " + " | ".join(counts.cell(each) for each in COLUMNS) + " |")
        with atomic_write(options.out) as temporary:
            temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(make_table, Options)
