"""A classifier on the Hugging Face hub: its model card, its folder, its upload in one commit."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.constants import CONFIG_NAME, REPOCARD_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HTTPError
from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from robust_submission.cli import numbers
from robust_submission.cli.documents import read_json, validated
from robust_submission.cli.errors import UserError, printable
from robust_submission.data.sources import read_recipe
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import Share
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.digest import module_digest
from robust_submission.models.gcm import GCM
from robust_submission.models.load import load_checkpoint
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.models.trn import TRN
from robust_submission.report import text
from robust_submission.report.schema import Report, read_report

CARD_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
RECIPE, PROVENANCE, REPORT = "recipe.yaml", "provenance.json", "report.json"
TRAINING = (
    *("data.name", "data.augmentation", "data.policy", "data.erasing", "epochs", "batch_size"),
    *("optimizer.name", "optimizer.lr"),
    *("objective.name", "objective.norm", "objective.epsilon", "objective.steps", "seed"),
)
"""The keys of a recipe that the card shows."""
_MARKDOWN = re.compile(r"[\\`*\[\]<>|]")


def markdown(value: Any) -> Any:
    """A plain value whose texts, in lists and groups too, are text in Markdown: one line, no link,
    table cell or HTML."""
    if isinstance(value, str):
        return _MARKDOWN.sub(r"\\\g<0>", printable(value).replace("\n", " "))
    if isinstance(value, Mapping):
        return {markdown(key): markdown(item) for key, item in value.items()}
    return [markdown(item) for item in value] if isinstance(value, list | tuple) else value


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
    data.license, used = license, set[Attacker]()
    if report is not None:
        data.model_name, data.eval_results = name, eval_results(report)
        used = {Attacker.OBLIVIOUS, Attacker.ADAPTIVE, *report.attackers}
        report = validated(Report, markdown(to_jsonable_python(report)))
    return ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        place=json.dumps(name)[1:-1],
        text=text,
        numbers=numbers,
        title=markdown(name),
        facts=markdown(facts(model)),
        model=model,
        report=report,
        attackers=[attacker for attacker in Attacker if attacker in used],
        training=markdown(training(recipe or {})),
        provenance=markdown(provenance),
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
        attacks = values.get("name") in ("adversarial", "trades", "guided") or name == "name"
        if name in values and (group != "objective" or attacks):
            norm = "linf" if name == "epsilon" else ""
            found[text.title(key)] = text.words(values[name], norm)
    return found


def eval_results(report: Report) -> list[EvalResult]:
    """The card's model-index: clean, both worst cases and every attack, as shares from 0 to 1."""
    first = report.measurements[0]
    ball = {"norm": first.norm, "epsilon": first.epsilon}
    worst = f"worst case of {first.norm} {numbers.radius(first.epsilon, first.norm)}"
    found = [_result(report, "clean", report.clean)]
    for attacker, share in (("oblivious", report.oblivious), ("adaptive", report.adaptive)):
        found.append(_result(report, f"{worst} {attacker}", share, attacker=attacker, **ball))
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


def fill_folder(
    folder: Path,
    name: str,
    *,
    checkpoint: Path,
    trn: Path | None = None,
    report: Path | None = None,
    license: str | None = None,
) -> None:
    """Fill `folder` with a classifier, its notes and its model card.

    Args:
        folder: An empty folder.
        name: The name that the card gives the model: a hub id or a folder.
        checkpoint: A run folder, or any folder with config.json and model.safetensors.
        trn: Run folder of a TRN to put in front of the classifier.
        report: The report folder that evaluate.py wrote of this model.
        license: The hub's name of the licence, such as "mit".

    Raises:
        UserError: a file cannot be read, or the report is of another model.
    """
    model = load_checkpoint(checkpoint, trn)
    recipe, provenance = checkpoint / RECIPE, checkpoint / PROVENANCE
    card = model_card(
        model,
        name,
        report=_read_report_of(model, report, checkpoint) if report else None,
        recipe=read_recipe(checkpoint, "no such file") if recipe.is_file() else None,
        provenance=_read_provenance(provenance) if provenance.is_file() else None,
        license=license,
    )
    copied = [path for path in (recipe, provenance) if path.is_file()]
    copied += [report / REPORT] if report else []
    if trn is not None:
        model.save_pretrained(folder)
    else:
        copied += [checkpoint / CONFIG_NAME, checkpoint / SAFETENSORS_SINGLE_FILE]
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    card.save(folder / REPOCARD_NAME)


def _read_report_of(model: RobustClassifier, folder: Path, checkpoint: Path) -> Report:
    report = read_report(folder)
    expected, found = module_digest(model), report.model.get("digest") or "none"
    if found != expected:
        raise UserError(
            f"{folder / REPORT}: expected a report of the model in {checkpoint}, digest "
            f"{expected}, found one of {report.model.get('name')}, digest {found}; evaluate again."
        )
    return report


def _read_provenance(path: Path) -> dict[str, JsonValue]:
    return validated(dict[str, JsonValue], read_json(path, "a run's provenance"), path)


def upload(folder: Path, repo_id: str, *, private: bool) -> str:
    """Create the repository if it does not exist, commit `folder` to it, and return the URL.

    Notes of an earlier upload that `folder` lacks are deleted by the same commit.

    Raises:
        UserError: there is no network or no permission, the hub refuses the card, or the
            repository is public although `private` is asked for.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError("expected a private repository, found a public one.")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload a classifier and its model card",
            delete_patterns=[RECIPE, PROVENANCE, REPORT],
        ).commit_url
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{repo_id}: not uploaded: {' '.join(str(error).split())}") from error
