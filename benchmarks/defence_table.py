"""What is left of GCM, or of TRN, once the attacker knows of it?

    python benchmarks/defence_table.py --model benchmarks.cifar10_resnet18:with_gcm \\
        --data.name folder --data.root data/raw/cifar10 --limit 500 --steps 20 --out table.md
    python benchmarks/defence_table.py --checkpoint runs/cifar10 --trn runs/cifar10_trn \\
        --out table.md --limit 1000 --adaptive_limit 200

GCM, as in its paper (arXiv 2205.10617): FGSM, PGD in three norms and C&W; attack robustness (AR, of
the images that are right when clean) of the model without GCM, with it, and with it under an
attacker who passes the gradient straight through (BPDA). The paper's L2 and L1 radii, 8.0 and 1600
at 224 pixels, are scaled to the image size so that a value may move as much: by the square root of
the number of values, and by that number.

TRN, like the tables of arXiv 2202.01117: FGSM, FFGSM, BIM, PGD and MIM in L-infinity by an attacker
who knows the classifier and not the TRN, scored without and with it. An image counts as right if it
is so without the attack too. Counted in any case, TRN can pass the clean accuracy: an attack moves
an image away from its label, which thereby can be read from it (label leaking, Kurakin et al.
2017); a separate column shows how far. The last columns are of attackers who know of TRN: one
differentiates through TRN and its gradient map (second order), one passes the gradient straight
through. Of GCM's PGD and TRN's adaptive attacks, an image counts as fooled at any step.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robust_submission.attacks import Attack, build_attack, image_seeds
from robust_submission.attacks.base import correct
from robust_submission.cli.command import Ratio, run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, check_writable
from robust_submission.data.loader import micro_batch_size
from robust_submission.evaluation.data import open_evaluation_data
from robust_submission.evaluation.results import share_of
from robust_submission.models.classifier import reveal, undefended
from robust_submission.models.gcm import GCM
from robust_submission.models.load import LoadedModel, load_named
from robust_submission.settings import DataOptions
from timing import load_images

SEED = 0  # of images and random starts
COLUMNS = {
    "alone": "classifier alone",
    "restored": "with TRN, transfer",
    "leaked": "the same, all images counted",
    "adaptive": "with TRN, adaptive",
    "adaptive-bpda": "with TRN, adaptive-bpda",
    "worst": "with TRN, worst of both",
}
Batches = Sequence[tuple[Tensor, Tensor, Tensor]]
"""Images (B, 3, H, W), labels (B,) and indices (B,)."""
Right = Mapping[str, Sequence[Tensor]]
"""By column, which images of each batch stay right: bool (n,)."""


@dataclass(kw_only=True)
class Options:
    """A table."""

    out: Path
    """The table, in Markdown."""
    checkpoint: Path | None = None
    """A run folder of a model with GCM, or of the classifier of a TRN."""
    model: str | None = None
    """Instead of a checkpoint: package.module:function, or path/file.py:function, that gives it."""
    trn: Path | None = None
    """Run folder of a TRN, which the table is then of; else of GCM."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images; by default the test images of the run."""
    limit: int = 1000
    """Images, stratified by class."""
    adaptive_limit: int = 200
    """How many of them, stratified too, those who know of TRN attack; 0 leaves them out."""
    epsilon: Ratio = Ratio("8/255")
    """Radius in L-infinity, in pixel values from 0 to 1."""
    steps: int = 10
    """Steps of bim, pgd and mim."""
    cw_steps: int = 30
    """Steps of C&W, in one search from initial_const 10."""


def cell(right: Sequence[Tensor]) -> str:
    """`62.1 [59.0, 65.1]`, percent with its 95 % interval; a dash where nothing was counted."""
    if not right:
        return "-"
    share = share_of(int(torch.cat(list(right)).sum()), sum(map(len, right)))
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def row(title: str, right: Right, columns: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {title} | {' | '.join(cell(right.get(column, ())) for column in columns)} |"


def head(title: str, columns: Iterable[str]) -> str:
    """The first two lines of a table."""
    cells = [title, *columns]
    return f"| {' | '.join(cells)} |\n{'|---' * len(cells)}|"


@torch.no_grad()
def is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool."""
    return correct(model(images), labels)


def clean(models: Mapping[str, nn.Module], batches: Batches) -> Right:
    """Which images are right without an attack, by column."""
    return {
        column: [is_right(model, images, labels) for images, labels, _ in batches]
        for column, model in models.items()
    }


def gcm_attacks(options: Options, image_size: int) -> dict[str, Attack]:
    """The attacks of GCM's paper at this image size."""
    values = (image_size / 224) ** 2  # over those of the paper's images
    l2, l1 = 8.0 * values**0.5, 1600 * values
    pgd = {"steps": options.steps, "early_stop": True}
    cw = {"steps": options.cw_steps, "binary_search_steps": 1, "initial_const": 10.0}
    linf = f"Linf {options.epsilon * 255:g}/255"
    return {
        f"FGSM {linf}": build_attack("fgsm", options.epsilon),
        f"PGD-{options.steps} L1 {l1:.1f}": build_attack("pgd", l1, "l1", **pgd),
        f"PGD-{options.steps} L2 {l2:.2f}": build_attack("pgd", l2, "l2", **pgd),
        f"PGD-{options.steps} {linf}": build_attack("pgd", options.epsilon, "linf", **pgd),
        f"C&W-{options.cw_steps} L2 {l2:.2f}": build_attack("cw", l2, **cw),
    }


def gcm_table(
    named: LoadedModel, model: nn.Module, batches: Batches, options: Options
) -> Iterator[str]:
    """The lines for a model with GCM; UserError if it has none."""
    vanilla = undefended(model)
    if not any(isinstance(stage, GCM) for stage in model.modules()):
        raise UserError(f"{named.name}: expected a model with GCM, found none in it.")
    views = {  # the model that is scored, the one that the attacker looks at
        "vanilla": (vanilla, vanilla),
        "with GCM, oblivious": (model, model),
        "with GCM, adaptive": (model, reveal(model)),
    }
    found = clean({"vanilla": vanilla, "with GCM": model}, batches)
    total = sum(map(len, found["vanilla"]))
    accuracies = ", ".join(f"{cell(right)} {each}" for each, right in found.items())
    black = sum(int((images == 0).sum()) for images, *_ in batches)
    black /= sum(images.numel() for images, *_ in batches)
    yield (
        f"{named.name}, {total} images, seed {SEED}, {100 * black:.0f} % of the values exactly 0, "
        f"where GCM hides no sign; clean accuracy {accuracies}.\n"
    )
    yield head("AR in %, 95 % interval", views)
    for title, attack in tqdm(gcm_attacks(options, named.image_size).items()):
        right = defaultdict[str, list[Tensor]](list)
        for images, labels, indices in batches:
            for column, (scored, seen) in views.items():
                chosen = is_right(scored, images, labels)
                seeds = image_seeds(SEED, indices[chosen])
                attacked = attack(seen, images[chosen], labels[chosen], seeds=seeds)
                right[column].append(is_right(scored, attacked, labels[chosen]))
        yield row(title, right, views)


def attack_trn(model: nn.Module, attacks: Sequence[Attack], batches: Batches, limit: int) -> Right:
    """Which images stay right, by column.

    Args:
        model: The classifier behind its TRN.
        attacks: One of the transfer attacker, and one of those who know of TRN.
        batches: All images.
        limit: How many of them, from the first on, those who know of TRN attack.
    """
    transfer, adaptive = attacks
    twin, right = undefended(model), defaultdict[str, list[Tensor]](list)
    views = {"adaptive": reveal(model), "adaptive-bpda": reveal(model, bypass=True)}
    for images, labels, indices in batches:
        seeds = image_seeds(SEED, indices)
        attacked = transfer(twin, images, labels, seeds=seeds)
        unattacked, restored = is_right(model, images, labels), is_right(model, attacked, labels)
        right["alone"].append(is_right(twin, images, labels) & is_right(twin, attacked, labels))
        right["restored"].append(unattacked & restored)
        right["leaked"].append(restored)
        worst = unattacked[: max(0, limit)]
        limit -= len(labels)
        if len(worst) == 0:
            continue
        chosen = worst.nonzero().squeeze(1)  # what is wrong when clean is not attacked
        for column, view in views.items():
            survives = torch.zeros_like(worst)
            found = adaptive(view, images[chosen], labels[chosen], seeds=seeds[chosen])
            survives[chosen] = is_right(model, found, labels[chosen])
            worst = worst & survives
            right[column].append(survives)
        right["worst"].append(worst)
    return right


def trn_attacks(epsilon: float, steps: int, *, early_stop: bool = False) -> dict[str, Attack]:
    """The attacks that the tables of TRN are of; the option is of those of many steps."""
    many = {"steps": steps, "early_stop": early_stop}
    return {
        "FGSM": build_attack("fgsm", epsilon),
        "FFGSM": build_attack("ffgsm", epsilon),
        **{
            f"{name.upper()}-{steps}": build_attack(name, epsilon, "linf", **many)
            for name in ("bim", "pgd", "mim")
        },
    }


def trn_table(
    named: LoadedModel, model: nn.Module, batches: Batches, options: Options
) -> Iterator[str]:
    """The lines for a classifier behind a TRN."""
    total = sum(len(labels) for _, labels, _ in batches)
    yield (
        f"{named.name}, {total} images ({min(options.adaptive_limit, total)} of them for adaptive "
        f"attackers), seed {SEED}, Linf {options.epsilon * 255:g}/255.\n"
    )
    yield head("accuracy in %, 95 % interval", COLUMNS.values())
    found = clean({"alone": undefended(model), "restored": model}, batches)
    yield row("clean", found, COLUMNS)
    transfer, adaptive = (
        trn_attacks(options.epsilon, options.steps, early_stop=stop) for stop in (False, True)
    )
    for title in tqdm(transfer):
        attacks = transfer[title], adaptive[title]
        right = attack_trn(model, attacks, batches, options.adaptive_limit)
        yield row(title, right, COLUMNS)


def measure(options: Options) -> None:
    """Measure and write the table, again after each line."""
    check_writable(options.out)
    named = load_named(options.checkpoint, options.model, trn=options.trn)
    if not isinstance(named.model, nn.Module):
        found = type(named.model).__name__
        raise UserError(f"{named.name}: expected a torch.nn.Module, found a {found}.")
    model = named.model.eval().requires_grad_(False)
    first = max(1, options.adaptive_limit) if options.trn else None
    data = open_evaluation_data(options.data, options.checkpoint, options.limit, first, SEED)
    data = data.matched_to(named.class_names)
    images, labels = load_images(data.source, data.indices, named.image_size)
    parts = (images, labels, torch.from_numpy(data.indices))
    size = micro_batch_size(named.image_size)
    batches = list(zip(*(each.split(size) for each in parts), strict=True))
    lines = list[str]()
    for line in (trn_table if options.trn else gcm_table)(named, model, batches, options):
        lines.append(line)
        with atomic_write(options.out) as temporary:
            temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(measure, Options)
