"""Which way to bring TRN's two streams together restores best, and which form of gradient map?

    python benchmarks/trn_designs.py --checkpoint runs/cifar10_atto --out table.md

Each design has as many parameters as the default TRN, within 2 %: its width is chosen so. All are
trained on the same attacked images, by the loss of the recipes, and tested on the same attacked
test images; a seed draws the weights at the start and, after them, the order. The attacker knows
the classifier and not the TRN. As in defence_table.py, an image counts if it is right without the
attack too. `points` is how far a line's mean over the five attacks is from that of the first
line, seed by seed, with the standard error over the seeds.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from defence_table import trn_attacks
from robust_submission.attacks import image_seeds
from robust_submission.cli.command import Names, Ratio, run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, check_writable
from robust_submission.evaluation.data import open_evaluation_data
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from robust_submission.models.trn import TRN
from robust_submission.models.trn.gradient_map import logit_weights, normalized
from robust_submission.models.trn.surrogate import patches
from robust_submission.settings import DataOptions
from robust_submission.training.objectives.restoration import attack_unaware, build_restoration
from robust_submission.training.recipe import RestorationConfig
from robust_submission.training.recipe.trn import AttackConfig
from timing import DEVICE, load_images

BATCH, EVALUATED = 64, 250
Streams = tuple[Tensor, Tensor]
Form = Callable[[Tensor], Tensor]
"""From raw gradients (B, C, H, W) to the map that a TRN sees."""


class Gated(nn.Module):
    """Each stream takes up the other, by a gate for each pixel and channel from both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(2 * width, 2 * width, 1)
        self.values = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))

    def forward(self, image: Tensor, gradient: Tensor) -> Streams:
        gates = self.gates(torch.cat([image, gradient], 1)).sigmoid()
        to_image, to_gradient = gates.chunk(2, 1)
        from_image, from_gradient = (
            layer(each) for layer, each in zip(self.values, (image, gradient), strict=True)
        )
        return image + to_image * from_gradient, gradient + to_gradient * from_image


class Modulation(nn.Module):
    """The gradient stream scales and shifts the image stream (FiLM, Perez et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 1)
        self.outer = nn.Conv2d(width, 2 * width, 1)
        nn.init.zeros_(self.outer.weight)

    def forward(self, image: Tensor, gradient: Tensor) -> Streams:
        scale, shift = self.outer(F.silu(self.inner(gradient))).chunk(2, 1)
        return image * (1 + scale) + shift, gradient


class CrossAttention(nn.Module):
    """The image stream asks the gradient stream, at a quarter of the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.value = (nn.Conv2d(width, width, 1) for _ in range(2))
        self.key, self.out = (nn.Conv2d(width, width, 1) for _ in range(2))
        nn.init.zeros_(self.out.weight)

    def forward(self, image: Tensor, gradient: Tensor) -> Streams:
        small, asked = F.avg_pool2d(image, 4), F.avg_pool2d(gradient, 4)
        query, key, value = (
            layer(each).flatten(2).transpose(1, 2)
            for layer, each in ((self.query, small), (self.key, asked), (self.value, asked))
        )
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return image + F.interpolate(self.out(found.reshape_as(small)), scale_factor=4), gradient


class Difference(nn.Module):
    """Each stream moves along a mixture of what the two differ in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 1)
        self.outer = nn.Conv2d(width, 2 * width, 1)

    def forward(self, image: Tensor, gradient: Tensor) -> Streams:
        to_image, to_gradient = self.outer(F.silu(self.inner(image - gradient))).chunk(2, 1)
        return image + to_image, gradient + to_gradient


class OneStream(TRN):
    """Image and map enter one stream together, as channels."""

    def __init__(self, width: int) -> None:
        super().__init__(width=width, streams="image")
        self.stems["image"] = patches(2 * self.channels, width, self.stride)

    def restore(self, images: Tensor, gradients: Tensor | None) -> Tensor:
        assert gradients is not None
        features = self.stems["image"](torch.cat([images, gradients], 1))
        for block in self.blocks["image"]:  # pyright: ignore[reportGeneralTypeIssues]
            features = block(features)
        return (images + F.pixel_shuffle(self.head(features), self.stride)).clamp(0, 1)


def with_blocks(block: Callable[[int], nn.Module], width: int) -> TRN:
    """A TRN with other blocks in place of Fusion Blocks."""
    trn = TRN(width=width)
    trn.fusions = nn.ModuleList(block(width) for _ in range(trn.depth))
    return trn


DESIGNS: dict[str, Callable[[int], TRN]] = {
    "Fusion Blocks": lambda width: TRN(width=width),
    "image stream only": lambda width: TRN(width=width, streams="image"),
    "concatenation at the end": lambda width: TRN(width=width, fusion="concatenation"),
    "one stream of both": OneStream,
    "gates for each pixel": partial(with_blocks, Gated),
    "modulation": partial(with_blocks, Modulation),
    "cross-attention": partial(with_blocks, CrossAttention),
    "differences": partial(with_blocks, Difference),
}
FORMS: dict[str, Form] = {
    "normalised": normalized,
    "sign": torch.sign,
    "raw": lambda gradient: gradient,
}


@dataclass(kw_only=True)
class Options:
    """What to train, and on what."""

    checkpoint: Path
    """Run folder of the classifier, of 32 px."""
    out: Path
    """The table, in Markdown."""
    designs: Names = Names(tuple(DESIGNS))
    """Ways to bring the streams together."""
    forms: Names = Names(("normalised",))
    """Forms of the gradient map: normalised, sign, raw."""
    data: DataOptions = field(default_factory=DataOptions)
    """The images; by default those of the run."""
    train: int = 6000
    """Training images, stratified by class; a quarter of them is not attacked."""
    test: int = 1000
    """Test images, stratified too."""
    epochs: int = 2
    """How often a TRN sees the training images."""
    seeds: int = 3
    """How many TRNs of each design."""


@dataclass(frozen=True)
class Images:
    """Clean images, and what became of them."""

    clean: Tensor
    """(N, C, H, W), 0 to 1."""
    attacked: Tensor
    """As `clean`."""
    gradients: Tensor
    """Raw gradients of the attacked images, as `clean`."""
    labels: Tensor
    """(N,)."""

    def batches(self, order: Tensor, size: int) -> Iterator["Images"]:
        """Rows in this order, `size` at a time."""
        for rows in order.split(size):
            clean, attacked, gradients = self.clean[rows], self.attacked[rows], self.gradients[rows]
            yield Images(clean, attacked, gradients, self.labels[rows])


def raw_gradients(classifier: RobustClassifier, images: Tensor) -> Tensor:
    """The gradients that the estimator "predicted" takes, before they are normalised."""
    found = list[Tensor]()
    for batch in images.split(EVALUATED):
        pixels = batch.clone().requires_grad_()
        logits = classifier.classify(pixels)
        found += torch.autograd.grad(logits, pixels, logit_weights(logits.detach(), "predicted"))
    return torch.cat(found)


def training_images(classifier: RobustClassifier, options: Options) -> Images:
    """Attacked as in cifar10_trn.yaml: PGD-10 at 8/255 and at 4/255, and a quarter left clean."""
    images, labels, seeds = read(classifier, options, "train", options.train)
    attacks = [AttackConfig(weight=2), AttackConfig(epsilon=Ratio("4/255"))]
    objective = build_restoration(RestorationConfig(attacks=attacks))
    parts = zip(*(each.split(EVALUATED) for each in (images, labels, seeds)), strict=True)
    attacked = torch.cat(
        [objective.examples(classifier, *part)[1] for part in tqdm(list(parts), desc="attacks")]
    )
    return Images(images, attacked, raw_gradients(classifier, attacked), labels)


def attacked_tests(classifier: RobustClassifier, options: Options) -> dict[str, Images]:
    """By attack, "clean" among them."""
    images, labels, seeds = read(classifier, options, "test", options.test)
    found = {"clean": Images(images, images, raw_gradients(classifier, images), labels)}
    for name, attack in tqdm(trn_attacks(8 / 255, 10).items(), desc="test attacks"):
        parts = zip(*(each.split(EVALUATED) for each in (images, labels, seeds)), strict=True)
        attacked = torch.cat([attack_unaware(attack, classifier, *part) for part in parts])
        found[name] = Images(images, attacked, raw_gradients(classifier, attacked), labels)
    return found


def read(
    classifier: RobustClassifier, options: Options, split: str, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and seeds of a split."""
    chosen = replace(options.data, split=split)
    data = open_evaluation_data(chosen, options.checkpoint, limit, 1, 0)
    data = data.matched_to(classifier.class_names)
    images, labels = load_images(data.source, data.indices, classifier.image_size)
    return images.to(DEVICE), labels.to(DEVICE), image_seeds(0, data.indices)


def sized(design: Callable[[int], TRN]) -> int:
    """The width that gives it the parameters of the default TRN; UserError beyond 2 %."""
    wanted = parameters(TRN())
    width = min(range(8, 129), key=lambda width: abs(parameters(design(width)) - wanted))
    if abs(parameters(design(width)) / wanted - 1) > 0.02:
        raise UserError(f"expected a width with {wanted} parameters, found none.")
    return width


def parameters(module: nn.Module) -> int:
    """How many numbers it learns."""
    return sum(each.numel() for each in module.parameters())


def trained(
    build: Callable[[], TRN],
    form: Form,
    classifier: RobustClassifier,
    images: Images,
    epochs: int,
    seed: int,
) -> TRN:
    """A TRN after training: AdamW by torch's one-cycle schedule, the rate rising over a tenth."""
    torch.manual_seed(seed)
    trn = build().to(DEVICE)
    optimizer = torch.optim.AdamW(trn.parameters(), 2e-3, weight_decay=0.01)
    steps = epochs * math.ceil(len(images.labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for _ in range(epochs):
        for batch in images.batches(torch.randperm(len(images.labels)), BATCH):
            restored = trn.restore(batch.attacked, form(batch.gradients))
            loss = F.cross_entropy(classifier.classify(restored), batch.labels)
            loss = loss + 10 * F.l1_loss(restored, batch.clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return trn.eval()


@torch.no_grad()
def right(trn: TRN, form: Form, classifier: RobustClassifier, images: Images) -> Tensor:
    """Which images are classified correctly once restored: (N,) bool."""
    rows = torch.arange(len(images.labels))
    return torch.cat(
        [
            classifier.classify(trn.restore(batch.attacked, form(batch.gradients))).argmax(1)
            == batch.labels
            for batch in images.batches(rows, EVALUATED)
        ]
    )


def accuracies(found: dict[str, Tensor]) -> list[float]:
    """Percent of all images: clean, then by attack those that are right without it too."""
    clean = found["clean"]
    return [100 * (clean & each).double().mean().item() for each in found.values()]


def spread(values: Sequence[float]) -> str:
    """`63.1 ± 0.4`: the mean and its standard error."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {error:.1f}"


def measure(options: Options) -> None:
    """Train each, and write the table, again after each line."""
    check_writable(options.out)
    for name, chosen, known in (
        ("designs", options.designs, DESIGNS),
        ("forms", options.forms, FORMS),
    ):
        if unknown := sorted(set(chosen) - set(known)):
            raise UserError(f"--{name}: expected {', '.join(known)}, found {unknown[0]}.")
    classifier = load_checkpoint(options.checkpoint).to(DEVICE).requires_grad_(False)
    images, tests = training_images(classifier, options), attacked_tests(classifier, options)
    columns = ("design", "map", "width", "parameters", *tests, "points")
    lines, first = [" | ".join(columns), " | ".join(["---"] * len(columns))], list[float]()
    for name in options.designs:
        width = sized(DESIGNS[name])
        build = partial(DESIGNS[name], width)
        for form in options.forms:
            results = list[list[float]]()
            for seed in tqdm(range(options.seeds), desc=f"{name}, {form}"):
                trn = trained(build, FORMS[form], classifier, images, options.epochs, seed)
                score = partial(right, trn, FORMS[form], classifier)
                results.append(accuracies({each: score(test) for each, test in tests.items()}))
            means = [statistics.mean(each[1:]) for each in results]
            first = first or means
            points = [own - other for own, other in zip(means, first, strict=True)]
            cells = [spread(each) for each in zip(*results, strict=True)]
            size = f"{parameters(build()):,}"
            lines.append(" | ".join([name, form, str(width), size, *cells, spread(points)]))
            with atomic_write(options.out) as temporary:
                temporary.write_text("".join(f"| {line} |\n" for line in lines))


if __name__ == "__main__":
    run(measure, Options)
