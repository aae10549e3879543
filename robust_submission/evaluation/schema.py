"""The robustness report as data: what evaluate.py measures, and what report.json holds.

`report.json` is `Report` field by field (docs/report.md explains it to readers). Every number comes
with its attack, norm, epsilon, number of images, seed and interval. Nothing here depends on time,
processes or interruptions, so that equal runs give equal files.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from scipy.stats import binomtest


class Attacker(StrEnum):
    """Who attacks: what the attacker knows, and so differentiates.

    Every attack is scored on the model as it is deployed.
    """

    OBLIVIOUS = "oblivious"
    """Knows of no defence and differentiates the model as it is."""
    ADAPTIVE = "adaptive"
    """Knows the defence and differentiates the model with its masking revealed: GCM by BPDA, TRN
    through its gradient map, random stages by their expectation."""
    ADAPTIVE_BPDA = "adaptive-bpda"
    """The same, with the gradient passed straight through TRN too."""
    TRANSFER = "transfer"
    """Differentiates the undefended twin."""


ADAPTIVE = (Attacker.ADAPTIVE, Attacker.ADAPTIVE_BPDA)
"""The attackers that know the defence."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of images with its 95 % interval."""

    value: float
    """From 0 to 1; for a random model the mean over draws."""
    low: float
    """Wilson's interval over images, widened to the spread over draws where that is larger."""
    high: float
    count: float
    """Images counted (a mean over draws may be broken)."""
    total: int
    """Images in all."""
    by_draw: tuple[float, ...] = ()
    """One value a draw of a random model; empty for a deterministic one."""


def share(count: float, total: int, by_draw: tuple[float, ...] = ()) -> Share:
    """`count` of `total` images with Wilson's 95 % interval; (0, 1) where there are no images."""
    if total == 0:
        return Share(value=0.0, low=0.0, high=1.0, count=0, total=0)
    interval = binomtest(round(count), total).proportion_ci(method="wilson")
    return Share(
        value=count / total,
        low=min(interval.low, *by_draw, count / total),
        high=max(interval.high, *by_draw, count / total),
        count=count,
        total=total,
        by_draw=by_draw,
    )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One attack on all images."""

    name: str
    """Unique, such as "pgd-20 linf 8/255 adaptive"."""
    attack: str
    attacker: Attacker
    norm: str
    epsilon: float
    """In the norm's unit, pixel values from 0 to 1."""
    settings: dict[str, Any]
    """Steps, step size, restarts, EOT draws: everything that repeats the attack."""
    robust_accuracy: Share
    """Images classified correctly after the attack, of all images."""
    attack_robustness: Share
    """The same of the images that are classified correctly when clean (AR, RobustART)."""
    largest_perturbation: float
    """The largest distance from a clean image, in the norm; at most epsilon but for rounding."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy against one quantity, on the same images at each point."""

    name: Literal["epsilon", "steps"]
    attacker: Attacker
    norm: str
    x: tuple[float, ...]
    accuracy: tuple[Share, ...]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One sign that gradients are masked, or that the evaluation cannot be trusted."""

    name: str
    question: str
    """In words, for the reader."""
    outcome: Literal["ok", "masking", "warning", "not run"]
    """masking: decides the verdict; warning: for the reader to weigh."""
    expected: str
    found: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of the gallery; uint8 arrays (H, W, 3) RGB go to the page, not to report.json."""

    id: str
    label: str
    clean_prediction: str
    oblivious_prediction: str
    adaptive_prediction: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that evaluate.py found."""

    model: dict[str, Any]
    """name, parameters, stages in force, image_size, num_classes, random (bool), digest of its
    structure and tensors (None where it is no nn.Module)."""
    data: dict[str, Any]
    """source, split, images, how they were chosen."""
    threat_model: str
    """In words."""
    seed: int
    clean: Share
    twin_clean: Share | None
    """Clean accuracy of the undefended twin on the same images."""
    oblivious: Share
    """The leaderboard number: worst case per image over the attacks through the model as it is."""
    adaptive: Share
    """The true number: worst case per image over every attack, adaptive and transfer ones too."""
    oblivious_robustness: Share
    """`oblivious` as AR: of the images classified correctly when clean."""
    adaptive_robustness: Share
    measurements: tuple[Measurement, ...]
    curves: tuple[Curve, ...]
    checks: tuple[Check, ...]
    verdict: Literal["masked", "no sign of masking"]
    gallery: tuple[Picture, ...]
    provenance: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    """The options that decide the report: norm, epsilons, steps, draws; the first epsilon is the
    headline's."""
    schema: int = 2
