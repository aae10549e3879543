"""The robustness report as data, and report.json, which is `Report` field by field.

docs/report.md explains it to readers. Every number comes with its attack, norm, epsilon, number of
images, seed and interval. Nothing depends on time, processes or interruptions, so that equal runs
give equal files.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic_core import to_jsonable_python

from robust_submission.cli.documents import read_json, validated
from robust_submission.cli.errors import UserError, shorten
from robust_submission.cli.numbers import percent, plural
from robust_submission.evaluation.checks import MaskingVerdict
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import (
    Check,
    CorruptedAccuracy,
    Curve,
    Measurement,
    MedianDistance,
    Outcome,
    Planted,
    Share,
)


@dataclass(frozen=True, kw_only=True)
class GalleryImage:
    """One image of the gallery; its pictures are on the page, not in report.json."""

    id: str
    label: str
    clean_prediction: str
    oblivious_prediction: str
    adaptive_prediction: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """All that an evaluation found. Printed, it is a summary in a few lines."""

    model: dict[str, Any]
    """name, parameters, stages in force, image_size, num_classes, random (bool), substituted (the
    operations through which adaptive-bpda passes the gradient straight), digest of its structure
    and tensors (None if it is no nn.Module)."""
    data: dict[str, Any]
    """source, part, images, how they were chosen."""
    threat_model: str
    """In words."""
    seed: int
    clean: Share
    twin_clean: Share | None
    """Clean accuracy of the undefended twin on the same images."""
    oblivious: Share
    """Robust accuracy in the worst case per image over all oblivious attacks."""
    adaptive: Share
    """Robust accuracy in the worst case per image over all attacks, adaptive and transfer ones
    too: an upper bound of what the model is worth once the attacker knows the defence."""
    adaptive_worst_draw: Share | None = None
    """The same, but only images that are right in every scored draw count: the attacker may submit
    an image again. Equal to `adaptive` for a deterministic model."""
    adaptive_fixed: Share | None = None
    """What withstands adaptive PGD alone, attacked and scored with the randomness held fixed: not
    part of `adaptive`. None for a deterministic model, and where it cannot be held."""
    oblivious_robustness: Share
    """`oblivious` as AR: of the images classified correctly when clean."""
    adaptive_robustness: Share
    measurements: Annotated[tuple[Measurement, ...], Field(min_length=1)]
    curves: tuple[Curve, ...]
    corruptions: CorruptedAccuracy | None = None
    """None where it was not asked for."""
    planted: Planted | None = None
    """How strong the adaptive attack is; None where it was not measured, for the reason that the
    check "finds planted examples" gives."""
    checks: tuple[Check, ...]
    verdict: MaskingVerdict
    gallery: tuple[GalleryImage, ...]
    provenance: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    """The options that decide the report: norm, epsilons, steps, draws; the headline numbers are
    for the first epsilon."""
    auc: float | None = None
    """Area under the ROC curve, without an attack; left out of report.json unless there are two
    classes."""
    corrupted_auc: float | None = None
    """The same on corrupted images, the mean over kinds and severities."""
    schema: int = 4

    def __repr__(self) -> str:
        signs = len(self.checks_with("masking"))
        ran = len(self.checks) - len(self.checks_with("not run"))
        mean = self.corruptions and self.corruptions.mean
        lines = [
            f"Report of {self.model.get('name')} on {plural(self.clean.total, 'image')}",
            f"clean accuracy {percent(self.clean.value)}",
            *([f"ROC AUC {self.auc:.4f}"] if self.auc is not None else []),
            *([f"corrupted accuracy {percent(mean.value)} (mean)"] if mean else []),
            f"robust accuracy {percent(self.oblivious.value)} (oblivious), "
            f"at most {percent(self.adaptive.value)} (adaptive)",
            *([f"half of the images fall {self.median.words}"] if self.median else []),
            *([f"adaptive PGD finds {self.planted.words}"] if self.planted else []),
            f"{self.verdict}: {signs} of {plural(ran, 'check')} show{'s' * (signs == 1)} masking",
        ]
        return "\n".join(lines)

    @property
    def gap(self) -> float:
        """By how much oblivious exceeds adaptive robust accuracy, from 0 to 1."""
        return self.oblivious.value - self.adaptive.value

    @property
    def median(self) -> MedianDistance | None:
        """The radius within which half of the images fall; None where it was not measured."""
        return next((curve.median for curve in self.curves if curve.median), None)

    @property
    def attackers(self) -> list[Attacker]:
        """Who attacked, in the enum's order."""
        used = {one.attacker for one in self.measurements}
        return [attacker for attacker in Attacker if attacker in used]

    @property
    def groups(self) -> list[list[Measurement]]:
        """Measurements with equal attack, norm and epsilon together, by attacker."""
        groups: dict[tuple[str, str, float], list[Measurement]] = {}
        for one in self.measurements:
            groups.setdefault((one.attack, one.norm, one.epsilon), []).append(one)
        order = list(Attacker)
        return [sorted(each, key=lambda one: order.index(one.attacker)) for each in groups.values()]

    def checks_with(self, outcome: Outcome) -> list[Check]:
        """The checks with one outcome, in order."""
        return [check for check in self.checks if check.outcome == outcome]


def json_text(report: Report) -> str:
    """The content of report.json: indented, UTF-8, null for what is not a finite number."""
    plain = to_jsonable_python(report, inf_nan_mode="null", fallback=_to_plain)
    plain = {k: v for k, v in plain.items() if v is not None or k not in ("auc", "corrupted_auc")}
    return json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_report(folder: Path) -> Report:
    """Read the report in `folder`.

    Raises:
        UserError: there is no report.json, as before an evaluation has finished; it cannot be read,
            is damaged or has another schema; or a number in it is not finite.
    """
    path = folder / "report.json"
    values = read_json(path, "the report of a finished evaluation")
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != Report.schema:
        found = shorten(schema)
        raise UserError(f"{path}: expected schema {Report.schema}, found {found}; evaluate again.")
    return validated(Report, values, path)


def _to_plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
