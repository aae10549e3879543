"""Builds the report, its pictures and its per-image table from the results."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn

from robust_submission.attacks.ensemble import UNCLEAR
from robust_submission.cli.numbers import radius
from robust_submission.data.images import resize_image
from robust_submission.evaluation.batch import CURVE_EOT, ENOUGH
from robust_submission.evaluation.checks import run_checks, verdict
from robust_submission.evaluation.checks.indicators import STILL_RISING
from robust_submission.evaluation.data import EvaluationData
from robust_submission.evaluation.jobs import ADAPTIVE, BLACK_BOX, Attacker, Job
from robust_submission.evaluation.results import (
    CorruptedAccuracy,
    Curve,
    KindAccuracy,
    Measurement,
    Results,
    accuracy,
    attack_robustness,
    every_draw,
    median_distance,
)
from robust_submission.evaluation.views import Views
from robust_submission.models.classifier import random_stages
from robust_submission.models.digest import module_digest
from robust_submission.models.gcm import GCM
from robust_submission.models.trn import TRN
from robust_submission.report.schema import GalleryImage, Report
from robust_submission.runtime import provenance
from robust_submission.settings import EvaluationSettings

if TYPE_CHECKING:
    import pandas as pd

SKIPPED = (
    "images that an earlier attack of several steps fools in every scored draw; they keep that "
    "attack's result and count as not robust"
)
"""What a job on survivors does not attack."""
INDICATORS = {
    "unstable": "noise fools",
    "rise": "loss still rising",
    "silent": "silent success",
    "view_only": "fools view only",
    "cosine": "gradient cosine",
}
"""Columns of watched PGD."""
OCTAVE = 8
"""Points of a fine curve from a radius to twice that radius."""
KNOWING = (*ADAPTIVE, Attacker.TRANSFER)
"""The attackers that count for the adaptive number only."""


@dataclass(frozen=True, kw_only=True)
class ReportBuilder:
    """Everything that was measured, and what it was measured with."""

    model: dict[str, Any]
    """`describe_model` of the views, before the attacks: running a model may change it."""
    results: Results
    views: Views
    data: EvaluationData
    settings: EvaluationSettings

    def report(self, options: dict[str, Any]) -> Report:
        """The report; `options` are its `settings`."""
        results, correct = self.results, self.results.correct
        oblivious, adaptive = self._worst_cases().values()
        worst = accuracy(adaptive)
        checks = run_checks(results, self.views, self.settings)
        twin = results.clean["twin"] == results.labels
        auc, corrupted_auc = results.roc_auc()
        has_twin = Attacker.TRANSFER in self.views.seen_by
        return Report(
            model=self.model,
            data=self.data.description,
            threat_model=threat_model(results.plan.main[0], self.views.random),
            seed=self.settings.seed,
            clean=accuracy(correct),
            twin_clean=accuracy(twin[:, None]) if has_twin else None,
            oblivious=accuracy(oblivious),
            adaptive=worst,
            adaptive_worst_draw=every_draw(adaptive),
            adaptive_fixed=None if results.fixed is None else accuracy(results.fixed[:, None]),
            oblivious_robustness=attack_robustness(oblivious, correct),
            adaptive_robustness=attack_robustness(adaptive, correct),
            measurements=tuple(self._measurement(job) for job in results.plan.main),
            curves=tuple(self._curves()),
            corruptions=self._corrupted() if results.corrupted else None,
            auc=auc,
            corrupted_auc=corrupted_auc,
            planted=results.planted_shares,
            checks=tuple(checks),
            verdict=verdict(checks, worst.value, results.plan.screened),
            gallery=tuple(self._gallery()),
            provenance=provenance(),
            settings=options | (_random_settings(self.settings) if self.views.random else {}),
        )

    def pictures(self) -> dict[str, list[np.ndarray]]:
        """uint8 (H, W, 3) RGB of the gallery's images: clean, oblivious and adaptive."""
        shown: dict[str, list[np.ndarray]] = {"clean": [], "oblivious": [], "adaptive": []}
        for place, (row, oblivious, adaptive) in enumerate(self._shown()):
            image = self.data.source.image(int(self.data.indices[row]))
            shown["clean"].append(resize_image(image, self.views.image_size))
            shown["oblivious"].append(self.results.pictures[oblivious][place])
            shown["adaptive"].append(self.results.pictures[adaptive][place])
        return shown

    def per_image_table(self) -> "pd.DataFrame":
        """One row per image, in the order of the source.

        Robust columns hold 1 or 0, for a random model the share of draws; predictions are of draw
        0. `corrupted` holds the share of kinds and severities (and draws) that are correct.
        """
        import pandas as pd  # takes half a second

        results, order = self.results, np.argsort(self.data.indices)
        names = np.array([*self.data.class_names, ""], dtype=object)  # NaN is -1: the last
        columns: dict[str, Any] = {
            "id": self.data.source.ids[self.data.indices[order]],
            "label": names[results.labels[order]],
            "clean prediction": names[results.clean["predictions"][order, 0]],
        }
        if results.corrupted:
            columns["corrupted"] = results.correct_corrupted.mean(axis=(1, 2, 3))[order]
        for job in results.plan.main:
            predictions = results.arrays[job]["predictions"]
            columns[f"{job.name} robust"] = _robust_column(results.robust(job)[order])
            columns[f"{job.name} prediction"] = names[predictions[order, 0]]
        columns |= {name: found[order] for name, found in self._indicator_columns()}
        if results.nearest is not None:
            nearest = np.full(len(order), np.nan)
            nearest[: results.curve_images] = results.nearest
            columns["nearest distance"] = np.where(np.isfinite(nearest), nearest, np.nan)[order]
        for name, robust in self._worst_cases().items():
            columns[f"worst case {name} robust"] = _robust_column(robust[order])
        return pd.DataFrame(columns)

    def _indicator_columns(self) -> Iterable[tuple[str, Any]]:
        """Why watched PGD failed; missing for images that it was not run on or are wrong when
        clean."""
        indicators, examined = self.results.indicators, np.zeros(len(self.results.labels), bool)
        if not indicators:
            return
        import pandas as pd

        examined[: self.results.curve_images] = self.results.examined
        flags = {name: found > 0 for name, found in indicators.items()}
        flags["rise"] = indicators["rise"] > STILL_RISING
        for key, name in INDICATORS.items():
            column = np.full(len(examined), np.nan)
            column[: len(flags[key])] = indicators[key] if key == "cosine" else flags[key]
            column[~examined] = np.nan
            yield name, pd.array(column, dtype="Float64" if key == "cosine" else "Int64")

    def _worst_cases(self) -> dict[str, np.ndarray]:
        """bool (n, draws): which images withstand all oblivious attacks, and all attacks."""
        plan = self.results.plan
        oblivious = plan.headline(Attacker.OBLIVIOUS)
        everything = plan.headline(*Attacker)
        return {
            "oblivious": self.results.worst_case(oblivious),
            "adaptive": self.results.worst_case(everything),
        }

    def _measurement(self, job: Job) -> Measurement:
        robust, arrays = self.results.robust(job), self.results.arrays[job]
        settings = job.settings(self.views.stops_early(job.attacker))
        settings["seed"] = "per image, from the report's seed and the image's index"
        if self.views.random:
            settings["draws_scored"] = self.settings.draws
            if job.attacker in ADAPTIVE:
                settings["draws_averaged"] = self.settings.eot
                settings["draws_averaged_if_clear"] = min(ENOUGH, self.settings.eot)
        if job.compares:
            names = [*job.parts, "an earlier attack"] if job.on_survivors else job.parts
            settings["fooled_first_by"] = {
                name: int((arrays["fooled_by"] == place).sum()) for place, name in enumerate(names)
            }
        if job.on_survivors:
            settings["skipped"] = SKIPPED
        return Measurement(
            name=job.name,
            attack=job.label,
            attacker=job.attacker,
            norm=job.norm,
            epsilon=float(job.epsilon),
            settings=settings,
            robust_accuracy=accuracy(robust),
            attack_robustness=attack_robustness(robust, self.results.correct),
            largest_perturbation=float(arrays["distance"].max(initial=0)),
        )

    def _corrupted(self) -> CorruptedAccuracy:
        correct = self.results.correct_corrupted
        kinds = tuple(
            KindAccuracy(
                kind=kind,
                mean=accuracy(correct[:, place]),
                by_severity=tuple(accuracy(each) for each in correct[:, place].swapaxes(0, 1)),
            )
            for place, kind in enumerate(self.results.corrupted)
        )
        return CorruptedAccuracy(mean=accuracy(correct), kinds=kinds)

    def _curves(self) -> Iterable[Curve]:
        plan = self.results.plan
        for attacker, jobs in plan.epsilon_curves.items():
            curve = self._curve("epsilon", jobs, [float(job.epsilon) for job in jobs])
            if plan.nearest is not None and plan.nearest.attacker == attacker:
                curve = self._at_every_radius(curve, plan.nearest)
            yield curve
        for jobs in plan.steps_curves.values():
            yield self._curve("steps", jobs, [float(job.steps or 0) for job in jobs])

    def _curve(self, name: Literal["epsilon", "steps"], jobs: list[Job], x: list[float]) -> Curve:
        shares = tuple(accuracy(self.results.on_curve(job)) for job in jobs)
        first = jobs[0]
        return Curve(
            name=name,
            attacker=first.attacker,
            norm=first.norm,
            attacks=(first.label if name == "epsilon" else first.attack,),
            x=tuple(x),
            accuracy=shares,
        )

    def _at_every_radius(self, curve: Curve, job: Job) -> Curve:
        """PGD's curve with that of the minimum-norm attack, of each image the nearer example."""
        distances, epsilon = self.results.nearest, self.results.plan.main[0].epsilon
        assert distances is not None
        largest = curve.x[-1]
        radii = (epsilon * 2 ** (octave / OCTAVE) for octave in range(-4 * OCTAVE, 2 * OCTAVE + 1))
        x = [0.0, *(float(each) for each in radii if each < largest), largest]
        return replace(
            curve,
            attacks=(job.label, *curve.attacks),
            x=tuple(x),
            accuracy=tuple(accuracy((distances > radius)[:, None]) for radius in x),
            median=median_distance(distances, job.norm),
        )

    def _gallery(self) -> Iterable[GalleryImage]:
        results = self.results
        names = [*self.data.class_names, "not a number"]  # NaN is -1: the last
        for row, oblivious, adaptive in self._shown():
            yield GalleryImage(
                id=str(self.data.source.ids[self.data.indices[row]]),
                label=names[results.labels[row]],
                clean_prediction=names[results.clean["predictions"][row, 0]],
                oblivious_prediction=names[results.arrays[oblivious]["predictions"][row, 0]],
                adaptive_prediction=names[results.arrays[adaptive]["predictions"][row, 0]],
            )

    def _shown(self) -> list[tuple[int, Job, Job]]:
        """Rows of the gallery with the oblivious and the adaptive attack to show."""
        plan = self.results.plan
        oblivious, knowing = plan.headline(Attacker.OBLIVIOUS), plan.headline(*KNOWING)
        return [
            (row, self._strongest(row, oblivious), self._strongest(row, knowing))
            for row in self.results.gallery
        ]

    def _strongest(self, row: int, jobs: list[Job]) -> Job:
        """The first job that fools an image, else the last one that uses gradients."""
        fooling = [job for job in jobs if not self.results.robust(job)[row, 0]]
        guided = [job for job in jobs if job.attack not in BLACK_BOX]
        return (fooling or guided[::-1] or jobs)[0]


def _random_settings(settings: EvaluationSettings) -> dict[str, Any]:
    """How a random model is attacked, beyond the options."""
    return {
        "eot_if_clear": min(ENOUGH, settings.eot),
        "eot_error": UNCLEAR,
        "eot_on_curves": min(CURVE_EOT, settings.eot),
        "draws_on_curves": 1,
    }


def _robust_column(robust: np.ndarray) -> np.ndarray:
    return robust[:, 0].astype(int) if robust.shape[1] == 1 else robust.mean(axis=1)


def describe_model(views: Views) -> dict[str, Any]:
    """What the report says about the model."""
    module = views.model if isinstance(views.model, nn.Module) else None
    modules = [] if module is None else list(module.modules())
    stages = [repr(each) for each in modules if isinstance(each, GCM)]
    stages += [] if module is None else [repr(stage) for stage in random_stages(module)]
    stages += [each.summary() for each in modules if isinstance(each, TRN)]
    return {
        "name": views.name,
        "parameters": None if module is None else sum(map(Tensor.numel, module.parameters())),
        "stages": stages,
        "image_size": views.image_size,
        "num_classes": views.num_classes,
        "random": views.random,
        "outputs": "probabilities" if views.softmax else "logits",
        "substituted": [] if views.found is None else list(views.found.substituted),
        "digest": None if module is None else module_digest(module),
    }


def threat_model(job: Job, random: bool) -> str:
    """Who attacks, knowing what, within which radius, and what counts as robust."""
    norm = {"linf": "L-infinity", "l2": "L2", "l1": "L1", "l1-dense": "L1"}[job.norm]
    unknown = ", except the random draws that will be used" if random else ""
    return (
        f"The attacker may change each image by at most {radius(job.epsilon, job.norm)} in the "
        f"{norm} norm of pixel values from 0 to 1, and wins with any wrong class (untargeted). "
        f"The adaptive attacker knows everything: data, weights and every defence{unknown}. The "
        "oblivious attacker knows of no defence and differentiates the model as it is. The "
        "transfer attacker differentiates a twin without defences: the model's own weights, or the "
        "model that was named as its twin. All are scored on the whole model as it is deployed. "
        "Images that it gets wrong without an attack count as not robust and are not attacked."
    )
