"""The model card: what a classifier is, and how robust it is according to its report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from robust_submission.cli import numbers
from robust_submission.cli.numbers import radius
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import Share
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.gcm import GCM
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.models.trn import TRN
from robust_submission.report import text
from robust_submission.report.schema import Report

CARD_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TRAINING = (
    *("data.name", "data.augmentation", "epochs", "batch_size", "optimizer.name", "optimizer.lr"),
    *("objective.name", "objective.epsilon", "objective.steps", "seed"),
)
"""The keys of a recipe that the card shows."""


def model_card(
    model: RobustClassifier,
    name: str,
    *,
    report: Report | None = None,
    recipe: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a classifier; without a report it says that robustness has not been measured.

    Args:
        model: The classifier.
        name: Where users load it from: a hub id or a folder.
        report: The report of evaluate.py on this very model.
        recipe: The run's recipe.yaml.
        provenance: The run's provenance.json.
        license: The hub's name of the licence, such as "mit".
    """
    data: Any = model.generate_model_card().data
    data.license = license
    if report is not None:
        data.model_name, data.eval_results = name, eval_results(report)
    return ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        name=name,
        text=text,
        numbers=numbers,
        facts=facts(model),
        model=model,
        report=report,
        rows=report.groups if report else [],
        attackers=table_attackers(report) if report else [],
        training=training(recipe or {}),
        provenance=provenance,
    )


def facts(model: RobustClassifier) -> dict[str, str]:
    """What the model is: names and values for the card's list."""
    backbone: Any = model.backbone
    size, names = model.image_size, model.class_names
    weights = sum(each.numel() for each in model.parameters())
    found = {
        "Backbone": f"{backbone.pretrained_cfg['architecture']} of timm; with all stages "
        f"{weights / 1e6:.2f} M parameters",
        "Input": f"RGB images (B, 3, {size}, {size}), 0 to 1; normalisation is inside",
        "Classes": f"{len(names)}: {', '.join(names[:20])}{', …' * (len(names) > 20)}",
        "GCM": "none",
        "TRN": "none",
    }
    if isinstance(model.conceal, GCM):
        found["GCM"] = "hides gradients; adds no robustness against adaptive attackers"
    if isinstance(model.restore, TRN):
        found["TRN"] = model.restore.summary()
    if isinstance(model.randomize, RandomResizePad):
        found["Randomness"] = str(model.randomize)
    return found


def training(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The settings of `TRAINING` in the recipe; without attacks, none of their settings."""
    found = dict[str, str]()
    for key in TRAINING:
        group, _, name = key.rpartition(".")
        values = recipe.get(group, {}) if group else recipe
        attacks = values.get("name") != "standard" or name == "name"
        if name in values and (group != "objective" or attacks):
            norm = "linf" if name == "epsilon" else ""
            found[text.title(key)] = text.words(values[name], norm)
    return found


def table_attackers(report: Report) -> list[Attacker]:
    """Who attacked, in the enum's order: the last columns of the table."""
    used = {Attacker.OBLIVIOUS, Attacker.ADAPTIVE, *report.attackers}
    return [attacker for attacker in Attacker if attacker in used]


def eval_results(report: Report) -> list[EvalResult]:
    """The card's model-index: clean, both worst cases and every attack, as shares from 0 to 1."""
    first = report.measurements[0]
    ball = {"norm": first.norm, "epsilon": first.epsilon}
    worst = f"worst case of {first.norm} {radius(first.epsilon, first.norm)}"
    found = [
        _result(report, "clean", report.clean),
        _result(report, f"{worst} oblivious", report.oblivious, attacker="oblivious", **ball),
        _result(report, f"{worst} adaptive", report.adaptive, attacker="adaptive", **ball),
    ]
    for one in report.measurements:
        arguments = {"norm": one.norm, "epsilon": one.epsilon, "attacker": str(one.attacker)}
        found.append(_result(report, one.name, one.robust_accuracy, attack=one.attack, **arguments))
    return found


def _result(report: Report, name: str, share: Share, **arguments: Any) -> EvalResult:
    masked = report.verdict == "masked" and arguments.get("attacker") == Attacker.OBLIVIOUS
    source = str(report.data.get("source"))
    return EvalResult(
        task_type="image-classification",
        dataset_type=source.partition(" in ")[0],  # "folder in photos": the hub wants no path
        dataset_name=source,
        metric_type="accuracy",
        metric_name=f"accuracy, {name}, {share.total} images{' (masked)' * masked}",
        metric_value=share.value,
        metric_args={
            **arguments,
            "images": share.total,
            "seed": report.seed,
            "interval_95": [share.low, share.high],
        },
    )
