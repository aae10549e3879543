"""Package a checkpoint for a platform that runs models, and prove the package before it is written.

    python submission/package.py --checkpoint runs/quickstart --out submission.zip
    python submission/package.py --profile codabench --format score --out submission.zip
    python submission/package.py --profile huggingface --out repository

The profile cvpr2022 is that of the challenge's Phase II:
submission.zip holds model.py, its configuration, the sources of the stages and the weights, and
needs torch and numpy alone; submission.onnx is one ONNX file. The package is first loaded by a
process of its own, as the organisers load it. It must pass what check.py checks and give the
checkpoint's logits on a set of images.

codabench and huggingface are programs that read a folder of images and write submission.csv,
offline, with torch, numpy and Pillow: a zip with its command in `metadata`, and a repository with
script.py. They are run as the platform does, and must write the checkpoint's predictions.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError, log
from robust_submission.cli.files import check_writable, checkpoint_files
from robust_submission.prediction.layout import plan_layout
from robust_submission.prediction.schema import Answers, Labels
from robust_submission.prediction.template import read_template

CHECKED = ("max_parameters", "max_operations", "memory")
WRITTEN = ("format", "template", "labels", "score_class", "probabilities")
"""Options of cvpr2022's package alone, and of programs alone."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A package."""

    out: Path
    """The package; of cvpr2022 the ending, .zip or .onnx, chooses the format; of huggingface a new
    folder."""
    profile: Literal["cvpr2022", "codabench", "huggingface"] = "cvpr2022"
    """Where the package is to run."""
    checkpoint: Path = Path("runs/quickstart")
    """A run folder, or any folder with config.json and model.safetensors."""
    trn: Path | None = None
    """Run folder of a TRN to put in front of the classifier."""
    images: Path | None = None
    """Folder of images to try it on; by default training images of the run."""
    limit: int = 64
    """Number of images to try it on."""
    format: Literal["csv", "neurips", "score"] = "csv"
    """What codabench and huggingface write, as in predict.py."""
    template: Path | None = None
    """A sample_submission.csv that gives their header and kind of ids and labels."""
    labels: Labels | None = None
    """names or indices of classes, as in predict.py."""
    score_class: str | None = None
    """Class whose probability is the score, as in predict.py."""
    probabilities: bool = False
    """Also write one probability column per class."""
    max_parameters: float = 30e6
    """Upper limit, exclusive."""
    max_operations: float = 5e9
    """Upper limit of multiply-adds per image, exclusive."""
    timeout: float = 1200.0
    """Seconds for the checks, or for the program."""
    memory: float = 6e9
    """Bytes for the checks, above what torch itself needs."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UserError(f"--limit: expected at least 1, found {self.limit}.")
        defaults = {each.name: each.default for each in fields(self)}
        program = self.profile != "cvpr2022"
        for name in CHECKED if program else WRITTEN:
            if getattr(self, name) != defaults[name]:
                expected = "cvpr2022" if program else "codabench or huggingface"
                raise UserError(f"--{name}: expected --profile {expected}, found {self.profile}.")


def package(options: Options) -> None:
    """Write the package.

    Raises:
        UserError: see `load_checkpoint`, `proof_images`, `write_package` and `write_platform`.
    """
    from robust_submission.checker.host import Rules
    from robust_submission.checker.sandbox import Limits
    from robust_submission.models.load import load_checkpoint
    from robust_submission.packaging.export import choose_writer
    from robust_submission.packaging.proof import proof_images, write_package

    if options.profile != "cvpr2022":
        package_program(options, options.profile)
        return
    read = checkpoint_files(options.checkpoint, options.trn)
    choose_writer(check_writable(options.out, *read, options.images))
    model = load_checkpoint(options.checkpoint, options.trn)
    rules = Rules(
        num_classes=len(model.class_names),
        image_size=model.image_size,
        max_parameters=options.max_parameters,
        max_operations=options.max_operations,
        limits=Limits(seconds=options.timeout, memory=options.memory),
    )
    pixels, description = proof_images(
        options.images, options.checkpoint, options.limit, model.image_size
    )
    difference, summary = write_package(model, options.out, pixels, rules)
    print(f"logits within {difference:.1e} of the checkpoint's on {len(pixels)} {description}")
    print(summary)


def package_program(options: Options, platform: Literal["codabench", "huggingface"]) -> None:
    """Write the package of a platform that runs a program."""
    from robust_submission.models.load import load_checkpoint
    from robust_submission.packaging.platforms import check_place, write_platform
    from robust_submission.packaging.proof import proof_images

    read = checkpoint_files(options.checkpoint, options.trn)
    check_writable(check_place(options.out, platform), *read, options.images, options.template)
    model = load_checkpoint(options.checkpoint, options.trn)
    answers = Answers(
        labels=options.labels,
        score_class=options.score_class,
        probabilities=options.probabilities,
    )
    template = read_template(options.template, options.format) if options.template else None
    names = [*template.rows] if template else ["0.png"]
    layout = plan_layout(options.format, names, model.class_names, template, answers)
    log.info("%s", layout.describe(model.class_names))
    pixels, description = proof_images(
        options.images, options.checkpoint, options.limit, model.image_size
    )
    written = write_platform(model, platform, options.out, layout, pixels, options.timeout)
    print(written, description)


if __name__ == "__main__":
    run(package, Options)
