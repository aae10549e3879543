"""Package a checkpoint for the challenge's Phase II, and prove the package before it is written.

    python submission/package.py --checkpoint runs/quickstart --out submission.zip

submission.zip holds model.py, its configuration, the sources of the stages and the weights, and
needs torch and numpy alone; submission.onnx is one ONNX file. The package is first loaded by a
process of its own, as the organisers load it. It must pass what check.py checks and give the
checkpoint's logits on a set of images.
"""

from dataclasses import dataclass
from pathlib import Path

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import check_writable, checkpoint_files


@dataclass(frozen=True, kw_only=True)
class Options:
    """A package."""

    out: Path
    """The package; its ending, .zip or .onnx, chooses the format."""
    checkpoint: Path = Path("runs/quickstart")
    """A run folder, or any folder with config.json and model.safetensors."""
    trn: Path | None = None
    """Run folder of a TRN to put in front of the classifier."""
    images: Path | None = None
    """Folder of images to compare logits on; by default training images of the run."""
    limit: int = 64
    """Number of images to compare logits on."""
    max_parameters: float = 30e6
    """Upper limit, exclusive."""
    max_operations: float = 5e9
    """Upper limit of multiply-adds per image, exclusive."""
    timeout: float = 1200.0
    """Seconds for the checks."""
    memory: float = 6e9
    """Bytes for the checks, above what torch itself needs."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UserError(f"--limit: expected at least 1, found {self.limit}.")


def package(options: Options) -> None:
    """Write the package.

    Raises:
        UserError: see `load_checkpoint`, `proof_images` and `write_package`.
    """
    from robust_submission.checker.host import Rules
    from robust_submission.checker.sandbox import Limits
    from robust_submission.models.load import load_checkpoint
    from robust_submission.packaging.export import choose_writer
    from robust_submission.packaging.proof import proof_images, write_package

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


if __name__ == "__main__":
    run(package, Options)
