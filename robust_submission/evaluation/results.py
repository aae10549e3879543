"""What was measured: per image as arrays, and as the numbers of a report."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from robust_submission.cli.numbers import distance, plural
from robust_submission.evaluation.cache import Arrays
from robust_submission.evaluation.jobs import Attacker, Job, Plan

Rate = Annotated[float, Field(ge=0, le=1)]
Outcome = Literal["ok", "masking", "failed", "warning", "not run"]
"""Of a check. Masking and failed decide the verdict: the gradients of the model are masked, or the
adaptive attack itself has failed. A warning is for the reader to weigh."""
GALLERY = 8
"""Images whose pictures are kept."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of images with its 95 % interval."""

    value: Rate
    """From 0 to 1; for a random model the mean over draws."""
    low: Rate
    """Wilson's interval over images, widened to the spread over draws where that is larger."""
    high: Rate
    count: NonNegativeFloat
    """Images counted; a mean over draws may be fractional."""
    total: NonNegativeInt
    """Images in all."""
    by_draw: tuple[Rate, ...] = ()
    """One value per draw of a random model; empty for a deterministic one."""


def share_of(count: float, total: int, by_draw: tuple[float, ...] = ()) -> Share:
    """`count` of `total` images with Wilson's 95 % interval; (0, 1) where there are no images."""
    if total == 0:
        return Share(value=0.0, low=0.0, high=1.0, count=0, total=0)
    from scipy.stats import binomtest  # takes a second

    interval = binomtest(round(count), total).proportion_ci(method="wilson")
    return Share(
        value=count / total,
        low=min(interval.low, *by_draw, count / total),
        high=max(interval.high, *by_draw, count / total),
        count=count,
        total=total,
        by_draw=by_draw,
    )


def accuracy(robust: np.ndarray) -> Share:
    """The share of images, by draw if there are several.

    Args:
        robust: bool (n, draws); or (n, …, draws), for the mean per image over what is between.
    """
    total, draws = robust.shape[0], robust.shape[-1]
    means = robust.reshape(-1, draws).mean(axis=0) if total and draws > 1 else ()
    times = math.prod(robust.shape[1:])
    return share_of(float(robust.sum() / times), total, tuple(float(value) for value in means))


def attack_robustness(robust: np.ndarray, clean: np.ndarray) -> Share:
    """AR (RobustART): the share of the images that are correct when clean.

    Args:
        robust: bool (n, draws), correct after the attack.
        clean: bool (n, draws), correct without it.
    """
    right, survived, draws = clean.sum(axis=0), robust.sum(axis=0), clean.shape[1]
    total = round(right.sum() / draws)
    by_draw = tuple(float(s / max(r, 1)) for s, r in zip(survived, right, strict=True))
    value = survived.sum() / max(right.sum(), 1)
    return share_of(round(float(value * total), 6), total, by_draw if draws > 1 and total else ())


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One attack by one attacker on all images."""

    name: str
    """Unique, such as "pgd-20 linf 8/255 adaptive"."""
    attack: str
    attacker: Attacker
    norm: str
    epsilon: NonNegativeFloat
    """In the norm's unit, pixel values from 0 to 1."""
    settings: dict[str, Any]
    """Steps, step size, restarts, EOT draws: everything that is needed to repeat the attack."""
    robust_accuracy: Share
    """Images classified correctly after the attack, of all images."""
    attack_robustness: Share
    """The same of the images that are classified correctly when clean (AR, RobustART)."""
    largest_perturbation: float
    """The largest distance from a clean image, in the norm; at most epsilon but for rounding."""


@dataclass(frozen=True, kw_only=True)
class MedianDistance:
    """The radius within which half of the images fall, those included that are wrong when clean.

    An upper bound, as there may be nearer adversarial images than were found. None where fewer
    fall.
    """

    norm: str
    value: NonNegativeFloat | None
    low: NonNegativeFloat | None
    """Its 95 % interval over images, from their order alone."""
    high: NonNegativeFloat | None
    total: NonNegativeInt
    """Images in all."""

    @property
    def words(self) -> str:
        """`within 3.41/255`, or that fewer fall."""
        return f"within {distance(self.value, self.norm)}" if self.value is not None else "nowhere"

    @property
    def interval(self) -> str:
        """`2.9/255 to 4.1/255`; unbounded where fewer than half might fall."""
        low, high = (math.inf if x is None else x for x in (self.low, self.high))
        return f"{distance(low, self.norm)} to {distance(high, self.norm)}"


def median_distance(distances: np.ndarray, norm: str) -> MedianDistance:
    """The median of distances (n,) that may be infinite; the lower one of two."""
    from scipy.stats import binom  # takes a second

    ordered, total = [0.0, *np.sort(distances).tolist(), math.inf], len(distances)
    # The median lies between these places with 95 %, as each image is below it half of the time.
    first = int(binom.ppf(0.025, total, 0.5))
    places = (math.ceil(total / 2), first, total + 1 - first)
    value, low, high = (x if math.isfinite(x := ordered[place]) else None for place in places)
    return MedianDistance(norm=norm, value=value, low=low, high=high, total=total)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy against one quantity, on the same images at each point."""

    name: Literal["epsilon", "steps"]
    attacker: Attacker
    norm: str
    attacks: tuple[str, ...]
    """Whose worst case per image it is, such as "fmn-50" and "pgd-20"."""
    x: tuple[float, ...]
    accuracy: tuple[Share, ...]
    median: MedianDistance | None = None
    """Of a curve over epsilon that has a minimum-norm attack; None for the others."""


@dataclass(frozen=True, kw_only=True)
class KindAccuracy:
    """Accuracy on images with one kind of corruption."""

    kind: str
    """One of `CORRUPTIONS`."""
    mean: Share
    """The mean over severities; its interval is over images."""
    by_severity: tuple[Share, ...]
    """Severities 1 to 5."""


@dataclass(frozen=True, kw_only=True)
class CorruptedAccuracy:
    """Accuracy of the model as it is deployed on corrupted images, without an attack."""

    mean: Share
    """The mean over kinds and severities; its interval is over images."""
    kinds: tuple[KindAccuracy, ...]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """How many planted adversarial examples are found; one per image is known to be in its ball."""

    found: Share
    """By PGD of the strongest adaptive attacker, of all that were planted."""
    oblivious: Share
    """By PGD that differentiates the model as it is."""
    fgsm: Share
    """By FGSM of the strongest adaptive attacker."""
    random: Share
    """By as many random points as PGD has steps."""
    left_out: int
    """Images in which no example could be planted."""

    @property
    def words(self) -> str:
        """`98 of 100 planted examples (PGD oblivious 0, FGSM 61, random points 0)`."""
        others = f"PGD oblivious {self.oblivious.count:g}, FGSM {self.fgsm.count:g}"
        found = f"{self.found.count:g} of {plural(self.found.total, 'planted example')}"
        return f"{found} ({others}, random points {self.random.count:g})"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One sign that gradients are masked, or that the evaluation cannot be trusted."""

    name: str
    question: str
    """In words, for the reader."""
    outcome: Outcome
    expected: str
    found: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything measured; rows are images in the order of `EvaluationData.indices`."""

    plan: Plan
    labels: np.ndarray
    """int64 (n,)."""
    curve_images: int
    """How many of them, from the first on, the curves are measured on."""
    clean: Arrays
    """As `ChunkEvaluator.clean` returns it."""
    corrupted: dict[str, Arrays] = field(default_factory=dict)
    """By kind of corruption, as `ChunkEvaluator.corrupted` returns it."""
    fixed: np.ndarray | None = None
    """bool (n,): which images are correct with and without PGD, the randomness held fixed; None for
    a deterministic model, and where it cannot be held."""
    indicators: Arrays = field(default_factory=dict)
    """As `ChunkEvaluator.watched` returns it, of the images of the curves; empty without curves."""
    planted: Arrays = field(default_factory=dict)
    """As `ChunkEvaluator.planted` returns it, of the first images; empty if it was not run."""
    arrays: dict[Job, Arrays]
    """As `ChunkEvaluator.attacked` returns it for every job of the plan, without pictures, but with
    `fooled_by` int64 (n,): which of several parts, else -1. Jobs of the curves have the first
    images only."""
    gallery: list[int]
    """Rows of the images to show."""
    adversarial: np.ndarray | None = None
    """float32 (n, 3, H, W), 0 to 1, if it was to be kept: of each image what the first job of the
    headline that fools the model makes of it, else the clean image."""
    pictures: dict[Job, np.ndarray]
    """uint8 (len(gallery), H, W, 3), of the jobs on all images."""

    @property
    def correct(self) -> np.ndarray:
        """bool (n, draws): which images are correct without an attack."""
        return self.clean["predictions"] == self.labels[:, None]

    def robust(self, job: Job) -> np.ndarray:
        """bool (n, draws): which images are correct both without the attack and after it; on a
        curve of a random model in its first draw alone, (n, 1)."""
        predictions = self.arrays[job]["predictions"]
        rows, draws = predictions.shape
        return self.correct[:rows, :draws] & (predictions == self.labels[:rows, None])

    @property
    def examined(self) -> np.ndarray:
        """bool (m,): which images of the curves have indicators, being correct when clean."""
        return np.logical_or.reduce(self.correct[: self.curve_images], axis=1)

    @property
    def correct_corrupted(self) -> np.ndarray:
        """bool (n, kinds, severities, draws): which corrupted images are correct."""
        predictions = np.stack([each["predictions"] for each in self.corrupted.values()], axis=1)
        return predictions == self.labels[:, None, None, None]

    def roc_auc(self) -> tuple[float | None, float | None]:
        """Area under the ROC curve of two classes: clean, and the mean over corrupted images and
        severities; None where there are other classes or no images of both."""
        clean = _area(self.labels, self.clean.get("scores"))
        areas = [_area(self.labels, each.get("scores")) for each in self.corrupted.values()]
        found = [area for area in areas if area is not None]
        return clean, float(np.mean(found)) if found else None

    def on_curve(self, job: Job) -> np.ndarray:
        """`robust`, for the images of the curves."""
        return self.robust(job)[: self.curve_images]

    @property
    def nearest(self) -> np.ndarray | None:
        """float64 (m,): how far from each image of the curves the strongest adaptive attacker found
        one that fools, by the minimum-norm attack or PGD; 0 where the image is wrong when clean,
        infinite where none was found. None where the plan has no minimum-norm attack."""
        job = self.plan.nearest
        if job is None:
            return None
        jobs = [job, *self.plan.epsilon_curves[job.attacker]]
        return np.minimum.reduce([self.distance(each) for each in jobs])

    def distance(self, job: Job) -> np.ndarray:
        """float64 (m,): how far from each image of the curves a job on a deterministic model found
        one that fools; infinite where it did not."""
        found = np.minimum(self.arrays[job]["distance"], job.epsilon)[: self.curve_images]
        return np.where(self.on_curve(job)[:, 0], np.inf, found)

    def worst_case(self, jobs: Iterable[Job]) -> np.ndarray:
        """bool (n, draws): which images withstand all of these jobs."""
        return np.logical_and.reduce([self.correct, *(self.robust(job) for job in jobs)])

    def withstood(self, jobs: Iterable[Job]) -> np.ndarray:
        """`worst_case`, but of a job on survivors only what it found itself counts, and not what it
        took over from earlier ones."""
        robust = [self.correct]
        for job in jobs:
            taken_over = self.arrays[job]["fooled_by"][:, None] == len(job.parts)
            robust.append(self.robust(job) | (self.correct & taken_over & job.on_survivors))
        return np.logical_and.reduce(robust)

    @property
    def chance(self) -> float:
        """Accuracy of the best constant answer: the share of the most frequent class."""
        return float(np.bincount(self.labels).max() / len(self.labels))

    @property
    def planted_shares(self) -> Planted | None:
        """How much of what was planted was found; None if nothing could be planted."""
        if not self.planted or not self.planted["planted"].any():
            return None
        planted = self.planted["planted"]
        total = int(planted.sum())

        def share(name: str) -> Share:
            return share_of(float((self.planted[name] & planted).sum()), total)

        return Planted(
            found=share("adaptive"),
            oblivious=share("oblivious"),
            fgsm=share("fgsm"),
            random=share("random"),
            left_out=len(planted) - total,
        )

    def survival(self, robust: np.ndarray) -> np.ndarray:
        """(m,): of each image that is correct when clean, the share of draws in `robust`."""
        correct = self.correct[: len(robust), : robust.shape[1]]
        kept = correct.any(axis=1)
        return robust[kept].sum(axis=1) / correct[kept].sum(axis=1)


def _area(labels: np.ndarray, scores: np.ndarray | None) -> float | None:
    """The mean area under the ROC curve over scores (n, …) that rank the second class higher."""
    if scores is None or set(labels.tolist()) != {0, 1} or not np.isfinite(scores).all():
        return None
    from sklearn.metrics import roc_auc_score  # takes a second

    columns = scores.reshape(len(scores), -1).T
    return float(np.mean([roc_auc_score(labels, column) for column in columns]))


def every_draw(robust: np.ndarray) -> Share:
    """The share of images that are right in all draws of `robust`, bool (n, draws).

    An attacker may submit an image again and again: one draw in which the model is wrong will do.
    """
    return accuracy(np.logical_and.reduce(robust, axis=1, keepdims=True))


def choose_gallery(predictions: np.ndarray, labels: np.ndarray, count: int = GALLERY) -> list[int]:
    """Rows of up to `count` images that are correct when clean: the first per class, then others.

    Args:
        predictions: int64 (n,).
        labels: int64 (n,).
        count: The largest number of rows.
    """
    right = np.flatnonzero(predictions == labels)
    _, first = np.unique(labels[right], return_index=True)
    firsts = np.sort(right[first])
    others = np.setdiff1d(right, firsts)
    return sorted(int(row) for row in [*firsts, *others][:count])
