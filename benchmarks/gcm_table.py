"""What is left of GCM once the attacker knows of it? The paper's table and one column more.

    python benchmarks/gcm_table.py --model benchmarks.cifar10_resnet18:with_gcm \\
        --data.name folder --data.root data/raw/cifar10 --limit 500 --out table.md

FGSM, PGD in three norms and C&W, as in the GCM paper (arXiv 2205.10617): attack robustness (AR, of
the images that are right when clean) of the model without GCM, with it, and with it under an
attacker who passes the gradient straight through (BPDA). The paper's L2 and L1 radii, 8.0 and 1600
at 224 pixels, are scaled to the image size so that a value may move as much: by the square root of
the number of values, and by that number. An image counts as fooled at any step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robust_submission.attacks import Attack, build_attack, image_seeds
from robust_submission.cli.command import run
from robust_submission.cli.files import atomic_write
from robust_submission.data.dataset import ImageDataset
from robust_submission.data.loader import EvaluationLoader, micro_batches
from robust_submission.evaluation.data import (
    DataOptions,
    EvaluationData,
    open_evaluation_data,
)
from robust_submission.evaluation.results import Share, share_of
from robust_submission.models.classifier import reveal, undefended
from robust_submission.models.load import load_named

PAPER_VALUES = 3 * 224**2


@dataclass(kw_only=True)
class Options:
    """A table."""

    out: Path
    """The table, in Markdown."""
    checkpoint: Path | None = None
    """A run folder of a model with GCM."""
    model: str | None = None
    """Instead of a checkpoint: package.module:function, or path/file.py:function, that gives a
    model with GCM."""
    image_size: int | None = None
    """Side of the images for --model, where the model does not say it."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images."""
    limit: int = 500
    """Images, drawn with the seed and stratified by class."""
    steps: int = 20
    """Steps of PGD."""
    cw_steps: int = 30
    """Steps of C&W, in one search from initial_const 10."""
    seed: int = 0
    """Of images and random starts."""


def paper_attacks(options: Options, image_size: int) -> dict[str, Attack]:
    """The paper's attacks at this image size."""
    values = 3 * image_size**2
    l2, l1 = 8.0 * (values / PAPER_VALUES) ** 0.5, 1600 * values / PAPER_VALUES
    pgd = {"steps": options.steps, "early_stop": True}
    cw = {"steps": options.cw_steps, "binary_search_steps": 1, "initial_const": 10.0}
    return {
        "FGSM Linf 8/255": build_attack("fgsm", 8 / 255),
        f"PGD-{options.steps} L1 {l1:.1f}": build_attack("pgd", l1, "l1", **pgd),
        f"PGD-{options.steps} L2 {l2:.2f}": build_attack("pgd", l2, "l2", **pgd),
        f"PGD-{options.steps} Linf 8/255": build_attack("pgd", 8 / 255, "linf", **pgd),
        f"C&W-{options.cw_steps} L2 {l2:.2f}": build_attack("cw", l2, **cw),
    }


def right_images(
    model: nn.Module, data: EvaluationData, image_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (B, 3, H, W), labels (B,) and indices (B,) of what the model gets right when clean."""
    dataset = ImageDataset(data.source, data.indices, image_size)
    for batch in micro_batches(EvaluationLoader(dataset, batch_size=64, num_workers=0)):
        with torch.no_grad():
            right = model(batch["images"]).argmax(1) == batch["labels"]
        yield batch["images"][right], batch["labels"][right], batch["indices"][right]


def attack_robustness(
    attack: Attack,
    models: tuple[nn.Module, nn.Module],
    data: EvaluationData,
    image_size: int,
    seed: int,
) -> Share:
    """AR of the first of the models under an attacker who looks at the second."""
    scored, seen = models
    survivors = total = 0
    for images, labels, indices in right_images(scored, data, image_size):
        adversarial = attack(seen, images, labels, seeds=image_seeds(seed, indices))
        with torch.no_grad():
            survivors += int((scored(adversarial).argmax(1) == labels).sum())
        total += len(labels)
    return share_of(survivors, total)


def percent(value: Share) -> str:
    """`12.3 [10.1, 14.8]`."""
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def make_table(options: Options) -> None:
    """Measure and write the table, again after each attack."""
    data = open_evaluation_data(options.data, options.checkpoint, options.limit, None, options.seed)
    named = load_named(options.checkpoint, options.model, options.image_size)
    assert isinstance(named.model, nn.Module)
    model = named.model.eval().requires_grad_(False)
    vanilla, revealed = undefended(model), reveal(model)
    if vanilla is model:
        raise ValueError(f"{named.name}: expected a model with GCM, found none in it.")
    columns = {
        "vanilla": (vanilla, vanilla),
        "with GCM, oblivious": (model, model),
        "with GCM, adaptive": (model, revealed),
    }
    clean = [share_of(0, 0)] * 2
    for place, each in enumerate((vanilla, model)):
        right = sum(len(part[1]) for part in right_images(each, data, named.image_size))
        clean[place] = share_of(right, len(data.indices))
    lines = [
        f"{named.name}, {len(data.indices)} images, seed {options.seed}; "
        f"clean accuracy {percent(clean[0])} vanilla, {percent(clean[1])} with GCM.",
        "",
        "| AR in %, 95 % interval | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name, attack in tqdm(paper_attacks(options, named.image_size).items()):
        cells = [
            percent(attack_robustness(attack, models, data, named.image_size, options.seed))
            for models in columns.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        with atomic_write(options.out) as temporary:
            temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(make_table, Options)
