"""The folder that goes to the Hugging Face hub, and its upload in one commit."""

import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.constants import CONFIG_NAME, REPOCARD_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HTTPError
from pydantic import JsonValue, TypeAdapter, ValidationError

from robust_submission.cli.errors import UserError
from robust_submission.data.sources import read_recipe
from robust_submission.evaluation.cache import module_digest
from robust_submission.hub.model_card import model_card
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from robust_submission.report.schema import Report, read_report

RECIPE, PROVENANCE, REPORT = "recipe.yaml", "provenance.json", "report.json"


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
    if report is not None:
        copied.append(report / REPORT)
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
            f"{expected}, found one of {report.model.get('name')}, digest {found}."
        )
    return report


def _read_provenance(path: Path) -> dict[str, JsonValue]:
    try:
        return TypeAdapter(dict[str, JsonValue]).validate_json(path.read_bytes())
    except ValidationError as error:
        found = error.errors()[0]["msg"]
        raise UserError(f"{path}: expected a JSON object, found: {found}.") from error


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
