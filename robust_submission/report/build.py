"""The report, its pictures and its table, put together from the findings."""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pandas as pd

from robust_submission.attacks import AutoAttack
from robust_submission.data.images import resize_image
from robust_submission.evaluation import wording
from robust_submission.evaluation.evidence import run_checks
from robust_submission.evaluation.plan import BLACK_BOX, Job, canonical
from robust_submission.evaluation.results import Findings, accuracy, attack_robustness
from robust_submission.evaluation.schema import (
    ADAPTIVE,
    Attacker,
    Curve,
    Measurement,
    Picture,
    Report,
)
from robust_submission.runtime import provenance


def build_report(findings: Findings, settings: dict[str, Any], seed: int) -> Report:
    """The report; `settings` are the options that decide it."""
    target, clean = findings.measure.target, findings.clean
    oblivious = findings.worst(findings.headline(Attacker.OBLIVIOUS))
    adaptive = findings.worst(findings.headline(Attacker.OBLIVIOUS, *ADAPTIVE, Attacker.TRANSFER))
    found = run_checks(findings)
    twin = findings.results.clean["twin"] == findings.labels
    return Report(
        model=target.describe(),
        data=findings.data.description,
        threat_model=threat_model(findings),
        seed=seed,
        clean=accuracy(clean),
        twin_clean=None if target.twin is None else accuracy(twin[:, None]),
        oblivious=accuracy(oblivious),
        adaptive=accuracy(adaptive),
        oblivious_robustness=attack_robustness(oblivious, clean),
        adaptive_robustness=attack_robustness(adaptive, clean),
        measurements=tuple(_measurement(findings, job) for job in findings.plan.main),
        curves=tuple(_curves(findings)),
        checks=tuple(found),
        verdict="masked"
        if any(check.outcome == "masking" for check in found)
        else "no sign of masking",
        gallery=tuple(_gallery(findings)),
        provenance=provenance(),
        settings=settings,
    )


def threat_model(findings: Findings) -> str:
    """Who attacks, knowing what, how far, and what counts as robust."""
    job, target = findings.plan.main[0], findings.measure.target
    words = {"linf": "L-infinity", "l2": "L2", "l1": "L1", "l1-dense": "L1"}[job.norm]
    size = wording.radius(job.epsilon, job.norm)
    unknown = "" if not target.random else ", except the random draws that will be in force"
    return (
        f"The attacker may change each image by at most {size} in the {words} norm "
        "of pixel values from 0 to 1, and wins with any wrong class (untargeted). "
        f"The adaptive attacker knows everything: data, weights and every defence{unknown}. The "
        "oblivious attacker differentiates the model as it stands and knows of no defence; the "
        "transfer attacker differentiates a twin without defences: the model's own weights, or the "
        "model that was named as its twin. All are scored on the whole model as it is deployed. "
        "Images that it gets wrong without an attack count as not robust and are not attacked."
    )


def _measurement(findings: Findings, job: Job) -> Measurement:
    robust, arrays, target = findings.robust(job), findings.arrays(job), findings.measure.target
    source = canonical(job, target)
    settings = source.settings(findings.measure.stops_early(source))
    settings["seed"] = "of each image, from the report's seed and its index"
    if target.random:
        settings["draws_scored"] = findings.measure.draws
        if job.attacker in ADAPTIVE:
            settings["draws_averaged"] = findings.measure.eot
    if job.attack == "autoattack":
        parts = arrays["fooled_by"]
        settings["fooled_first_by"] = {
            part: int((parts == place).sum()) for place, part in enumerate(AutoAttack.STANDARD)
        }
    return Measurement(
        name=job.name,
        attack=job.label,
        attacker=job.attacker,
        norm=job.norm,
        epsilon=float(job.epsilon),
        settings=settings,
        robust_accuracy=accuracy(robust),
        attack_robustness=attack_robustness(robust, findings.clean),
        largest_perturbation=float(arrays["distance"].max(initial=0)),
    )


def _curves(findings: Findings) -> Iterable[Curve]:
    for attacker, jobs in findings.plan.epsilon_curves.items():
        yield _curve(findings, "epsilon", attacker, jobs, [float(job.epsilon) for job in jobs])
    for attacker, jobs in findings.plan.steps_curves.items():
        yield _curve(findings, "steps", attacker, jobs, [float(job.steps or 0) for job in jobs])


def _curve(
    findings: Findings,
    name: Literal["epsilon", "steps"],
    attacker: Attacker,
    jobs: list[Job],
    x: list[float],
) -> Curve:
    shares = tuple(accuracy(findings.on_curve(job)) for job in jobs)
    return Curve(name=name, attacker=attacker, norm=jobs[0].norm, x=tuple(x), accuracy=shares)


def _strongest(findings: Findings, row: int, jobs: list[Job]) -> Job:
    """The first job that fools an image, else the last with gradients."""
    fooling = [job for job in jobs if not findings.robust(job)[row, 0]]
    guided = [job for job in jobs if job.attack not in BLACK_BOX]
    return (fooling or guided[::-1] or jobs)[0]


def _shown(findings: Findings) -> list[tuple[int, Job, Job]]:
    """Rows of the gallery with the oblivious and the adaptive attack to show."""
    oblivious, adaptive = (
        findings.headline(Attacker.OBLIVIOUS),
        findings.headline(*ADAPTIVE, Attacker.TRANSFER),
    )
    return [
        (row, _strongest(findings, row, oblivious), _strongest(findings, row, adaptive))
        for row in findings.results.gallery
    ]


def _class_name(findings: Findings, label: int) -> str:
    return findings.data.class_names[label] if label >= 0 else "not a number"


def _gallery(findings: Findings) -> Iterable[Picture]:
    for row, oblivious, adaptive in _shown(findings):
        labels = [
            findings.labels[row],
            findings.results.clean["predictions"][row, 0],
            findings.arrays(oblivious)["predictions"][row, 0],
            findings.arrays(adaptive)["predictions"][row, 0],
        ]
        label, clean, fooled, revealed = (_class_name(findings, int(each)) for each in labels)
        yield Picture(
            id=str(findings.data.source.ids[findings.data.indices[row]]),
            label=label,
            clean_prediction=clean,
            oblivious_prediction=fooled,
            adaptive_prediction=revealed,
        )


def gallery_pictures(findings: Findings) -> dict[str, list[np.ndarray]]:
    """uint8 (H, W, 3) RGB of the gallery's images: clean, oblivious and adaptive."""
    target, pictures = findings.measure.target, findings.results.pictures
    shown: dict[str, list[np.ndarray]] = {"clean": [], "oblivious": [], "adaptive": []}
    for place, (row, oblivious, adaptive) in enumerate(_shown(findings)):
        image = findings.data.source.image(int(findings.data.indices[row]))
        shown["clean"].append(resize_image(image, target.image_size))
        shown["oblivious"].append(pictures[canonical(oblivious, target)][place])
        shown["adaptive"].append(pictures[canonical(adaptive, target)][place])
    return shown


def per_image_table(findings: Findings) -> pd.DataFrame:
    """One row an image, in the order of the source.

    Robust columns hold 1 or 0, for a random model the share of draws; predictions are of draw 0.
    """
    order = np.argsort(findings.data.indices)
    indices = findings.data.indices[order]
    names = np.array([*findings.data.class_names, ""], dtype=object)  # NaN is -1: the last
    columns: dict[str, Any] = {
        "id": findings.data.source.ids[indices],
        "label": names[findings.labels[order]],
        "clean prediction": names[findings.results.clean["predictions"][order, 0]],
    }
    for job in findings.plan.main:
        columns[f"{job.name} robust"] = _robust_column(findings.robust(job)[order])
        columns[f"{job.name} prediction"] = names[findings.arrays(job)["predictions"][order, 0]]
    views: dict[str, tuple[Attacker, ...]] = {
        "oblivious": (Attacker.OBLIVIOUS,),
        "adaptive": (Attacker.OBLIVIOUS, *ADAPTIVE, Attacker.TRANSFER),
    }
    for name, attackers in views.items():
        worst = findings.worst(findings.headline(*attackers))
        columns[f"worst case {name} robust"] = _robust_column(worst[order])
    return pd.DataFrame(columns)


def _robust_column(robust: np.ndarray) -> np.ndarray:
    return robust[:, 0].astype(int) if robust.shape[1] == 1 else robust.mean(axis=1)
