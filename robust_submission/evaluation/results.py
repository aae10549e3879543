"""What was measured, read image by image: who withstood what."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from robust_submission.evaluation.batch import Measure
from robust_submission.evaluation.cache import Arrays
from robust_submission.evaluation.evaluation_data import EvaluationData
from robust_submission.evaluation.plan import Job, Plan, canonical
from robust_submission.evaluation.runner import Results
from robust_submission.evaluation.schema import Attacker, Share, share


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Results with what is needed to read them."""

    measure: Measure
    data: EvaluationData
    plan: Plan
    results: Results

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,)."""
        return self.data.labels[self.data.indices]

    @property
    def clean(self) -> np.ndarray:
        """bool (n, draws): which images are right without an attack."""
        return self.results.clean["predictions"] == self.labels[:, None]

    def on_curve(self, job: Job) -> np.ndarray:
        """`robust`, of the images of the curves."""
        return self.robust(job)[: self.data.curve_images]

    def arrays(self, job: Job) -> Arrays:
        """As `Measure.attacked` gives it."""
        return self.results.jobs[canonical(job, self.measure.target)]

    def robust(self, job: Job) -> np.ndarray:
        """bool (n, draws): which images are right both without the attack and after it."""
        predictions = self.arrays(job)["predictions"]
        rows = len(predictions)
        return self.clean[:rows] & (predictions == self.labels[:rows, None])

    def worst(self, jobs: Iterable[Job]) -> np.ndarray:
        """bool (n, draws): which images withstand all of these jobs."""
        return np.logical_and.reduce([self.clean, *(self.robust(job) for job in jobs)])

    def headline(self, *attackers: Attacker) -> list[Job]:
        """The jobs at the first epsilon by these attackers."""
        epsilon = self.plan.main[0].epsilon
        return [
            job for job in self.plan.main if job.epsilon == epsilon and job.attacker in attackers
        ]

    def survival(self, robust: np.ndarray) -> np.ndarray:
        """(m,): the share of draws in which each image that is right when clean survives."""
        clean = self.clean[: len(robust)]
        kept = clean.any(axis=1)
        return robust[kept].sum(axis=1) / clean[kept].sum(axis=1)


def accuracy(robust: np.ndarray) -> Share:
    """The share of images, by draw where there are several; `robust` is bool (n, draws)."""
    total, draws = robust.shape
    by_draw = tuple(float(value) for value in robust.mean(axis=0)) if total and draws > 1 else ()
    return share(float(robust.sum() / draws), total, by_draw)


def attack_robustness(robust: np.ndarray, clean: np.ndarray) -> Share:
    """AR: the share of the images that are right when clean; both are bool (n, draws)."""
    right, survived, draws = clean.sum(axis=0), robust.sum(axis=0), clean.shape[1]
    total = round(right.sum() / draws)
    by_draw = tuple(float(s / max(r, 1)) for s, r in zip(survived, right, strict=True))
    value = survived.sum() / max(right.sum(), 1)
    return share(round(float(value * total), 6), total, by_draw if draws > 1 and total else ())
