"""Upload a classifier to the Hugging Face hub with a model card that holds its report's numbers.

    python submission/push_to_hub.py --checkpoint runs/x --report report --repo_id user/name
    python submission/push_to_hub.py --checkpoint runs/x --report report --out card

What goes up, in one commit: config.json and model.safetensors; recipe.yaml, provenance.json and
report.json as they are, with the paths that they name; README.md, the card. A checkpoint that
cannot be loaded and a report of another model are refused. The token is that of `hf auth login`, or
HF_TOKEN.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import CONFIG_NAME, REPOCARD_NAME, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import whole_folder
from robust_submission.data.run_data import read_recipe
from robust_submission.evaluation.cache import module_digest
from robust_submission.evaluation.schema import Report
from robust_submission.hub.model_card import model_card
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from robust_submission.report.write import read_report

EXTRAS = ("recipe.yaml", "provenance.json", "report.json")


@dataclass(frozen=True, kw_only=True)
class Options:
    """An upload."""

    checkpoint: Path = Path("runs/quickstart")
    """A run folder, or any folder with config.json and model.safetensors."""
    trn: Path | None = None
    """Run folder of a TRN to put before the classifier."""
    report: Path | None = None
    """The report folder that evaluate.py wrote of this model; without it the card says that
    robustness has not been measured."""
    repo_id: str | None = None
    """Where it goes: user/name."""
    private: bool = False
    """Make the repository private, and upload to no public one."""
    license: str | None = None
    """The hub's name of the model's licence, such as mit."""
    out: Path | None = None
    """Write the folder here and upload nothing."""

    def __post_init__(self) -> None:
        if (self.repo_id is None) == (self.out is None):
            raise UserError("expected either --repo_id or --out, found both or neither.")
        if self.private and self.repo_id is None:
            raise UserError("--private: expected a --repo_id to keep private, found --out.")
        if self.repo_id is not None:
            if self.repo_id.count("/") != 1:
                raise UserError(f"--repo_id: expected user/name, found {self.repo_id!r}.")
            validate_repo_id(self.repo_id)


def load_report(folder: Path, model: RobustClassifier, checkpoint: Path) -> Report:
    """The report in `folder`, when it is of `model`.

    Raises:
        UserError: see `read_report`; or it is of another model.
    """
    report = read_report(folder)
    expected, found = module_digest(model), report.model.get("digest") or "none"
    if found != expected:
        raise UserError(
            f"{folder / 'report.json'}: expected a report of the model in {checkpoint}, digest "
            f"{expected}, found one of {report.model.get('name')}, digest {found}."
        )
    return report


def read_provenance(path: Path) -> dict[str, Any]:
    """What provenance.json holds, or a ValueError that names it."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON object, found {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(found).__name__}.")
    return found


def assemble(options: Options, folder: Path) -> None:
    """Fill `folder` with what goes up.

    Raises:
        UserError: see `load_checkpoint`, `load_report` and `read_recipe`.
    """
    checkpoint = options.checkpoint
    model = load_checkpoint(checkpoint, options.trn)
    report = load_report(options.report, model, checkpoint) if options.report else None
    recipe, provenance = checkpoint / "recipe.yaml", checkpoint / "provenance.json"
    card = model_card(
        model,
        options.repo_id or Path(options.out or folder).name,
        report=report,
        recipe=read_recipe(checkpoint, "no such file") if recipe.is_file() else None,
        provenance=read_provenance(provenance) if provenance.is_file() else None,
        license=options.license,
    )
    copied = [path for path in (recipe, provenance) if path.is_file()]
    if options.report:
        copied.append(options.report / "report.json")
    if options.trn:
        model.save_pretrained(folder)
    else:
        copied += [checkpoint / CONFIG_NAME, checkpoint / SAFETENSORS_SINGLE_FILE]
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    card.save(folder / REPOCARD_NAME)


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Make the repository where there is none, commit `folder` to it, and say where it is.

    What an earlier upload left of `EXTRAS` goes with the same commit.

    Raises:
        UserError: no network, no permission, a card that the hub refuses, or a public repository
            where a private one is asked for.
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
            delete_patterns=list(EXTRAS),
        ).commit_url
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{repo_id}: not uploaded: {' '.join(str(error).split())}") from error


def push_to_hub(options: Options) -> None:
    """Assemble the folder, and upload it or leave it at `out`.

    Raises:
        UserError: see `assemble`, `upload` and `whole_folder`.
    """
    place = whole_folder(options.out) if options.out else tempfile.TemporaryDirectory()
    with place as folder:
        assemble(options, Path(folder))
        if options.repo_id is not None:
            print(upload(Path(folder), options.repo_id, options.private))
    if options.out is not None:
        print(options.out / REPOCARD_NAME)


if __name__ == "__main__":
    run(push_to_hub, Options)
