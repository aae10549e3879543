"""Upload a classifier to the Hugging Face hub, with a model card of its report's numbers.

    python submission/push_to_hub.py --checkpoint runs/x --report report --repo_id user/name
    python submission/push_to_hub.py --checkpoint runs/x --report report --out card

One commit uploads config.json and model.safetensors; recipe.yaml, provenance.json and report.json
unchanged, with the paths in them; and README.md, the card. A report of another model is refused.
The token is that of `hf auth login`, or HF_TOKEN.
"""

from dataclasses import dataclass
from pathlib import Path

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import scratch_folder, whole_folder


@dataclass(frozen=True, kw_only=True)
class Options:
    """An upload."""

    checkpoint: Path = Path("runs/quickstart")
    """A run folder, or any folder with config.json and model.safetensors."""
    trn: Path | None = None
    """Run folder of a TRN to put in front of the classifier."""
    report: Path | None = None
    """The report folder that evaluate.py wrote of this model; without it the card says that
    robustness has not been measured."""
    repo_id: str | None = None
    """The repository: user/name."""
    private: bool = False
    """Create a private repository, and do not upload to a public one."""
    license: str | None = None
    """The hub's name of the model's licence, such as mit."""
    out: Path | None = None
    """Write the folder here instead of uploading it."""

    def __post_init__(self) -> None:
        if (self.repo_id is None) == (self.out is None):
            raise UserError("expected either --repo_id or --out, found both or neither.")
        if self.private and self.repo_id is None:
            raise UserError("--private: expected a --repo_id to keep private, found --out.")
        if self.repo_id is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils import validate_repo_id

            if self.repo_id.count("/") != 1:
                raise UserError(f"--repo_id: expected user/name, found {self.repo_id!r}.")
            try:
                validate_repo_id(self.repo_id)
            except HFValidationError as error:
                raise UserError(f"--repo_id: expected user/name, found: {error}") from error


def push_to_hub(options: Options) -> None:
    """Fill a folder, and upload it or leave it at `out`.

    Raises:
        UserError: see `fill_folder`, `upload` and `whole_folder`.
    """
    from huggingface_hub.constants import REPOCARD_NAME

    from robust_submission.hub.model_card import fill_folder, upload

    place = whole_folder(options.out) if options.out else scratch_folder("upload-")
    with place as folder:
        fill_folder(
            folder,
            options.repo_id or (options.out or folder).name,
            checkpoint=options.checkpoint,
            trn=options.trn,
            report=options.report,
            license=options.license,
        )
        if options.repo_id is not None:
            print(upload(folder, options.repo_id, private=options.private))
    if options.out is not None:
        print(options.out / REPOCARD_NAME)


if __name__ == "__main__":
    run(push_to_hub, Options)
