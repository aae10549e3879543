"""Check a submission, yours or a stranger's, as the organisers would: contract and budget.

    python submission/check.py submission.zip --images validation

The archive is unpacked within bounds and its model runs in a process of its own, with torch and
numpy alone, little time and memory, and, where Linux allows, in namespaces of its own: no network,
no other process in sight. That bounds mistakes, not malice: what you distrust, check with
--container, in the image robust-submission (docker build --tag robust-submission .).
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from robust_submission.cli.command import Names, run
from robust_submission.cli.errors import UserError

NOT_PASSED_ON = {"file", "images", "container"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to check, and against which rules."""

    file: Path = field(metadata={"positional": True})
    """The submission: a .zip or .onnx file."""
    images: Path | None = None
    """Labelled images for the checks of channel order and range: a folder for each class, or
    images/ and label.txt."""
    limit: int = 200
    """At most this many of them, stratified by class."""
    num_classes: int = 100
    """Logits per image."""
    image_size: int = 224
    """Side of the input in pixels."""
    max_parameters: float = 30e6
    """Upper limit, exclusive."""
    max_operations: float = 5e9
    """Upper limit of multiply-adds per image, exclusive."""
    packages: Names = Names("torch,numpy")
    """All that the model may import besides Python's own library."""
    timeout: float = 600.0
    """Seconds for everything together."""
    memory: float = 6e9
    """Bytes, above what torch itself takes."""
    seed: int = 0
    """Seed of the choice of images."""
    container: bool = False
    """Check in a container of docker or podman: offline, read-only, without privileges."""

    def __post_init__(self) -> None:
        for name in ("limit", "num_classes", "image_size", "timeout", "memory"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name}: expected more than 0, found {getattr(self, name)}.")


def contained(options: Options) -> tuple[dict[str, Path], list[str]]:
    """What a container must have of the user's files, by its paths, and its command line."""
    inputs = {f"/in/submission{options.file.suffix}": options.file}
    words = [*inputs]
    if options.images is not None:
        inputs["/images"] = options.images
        words.append("--images=/images")
    for name in sorted({each.name for each in fields(options)} - NOT_PASSED_ON):
        value = getattr(options, name)
        words.append(f"--{name}={','.join(value) if isinstance(value, tuple) else value}")
    return inputs, words


def main(options: Options) -> None:
    """Print the table.

    Raises:
        UserError: a check failed, or there is nothing to check.
    """
    from robust_submission.checker.checks import check_trial
    from robust_submission.checker.container import run_contained
    from robust_submission.checker.host import Rules, read_labelled, try_submission
    from robust_submission.checker.sandbox import Limits
    from robust_submission.checker.table import print_verdicts

    if options.container:
        inputs, words = contained(options)
        run_contained("submission/check.py", inputs, words)
        return
    rules = Rules(
        num_classes=options.num_classes,
        image_size=options.image_size,
        max_parameters=options.max_parameters,
        max_operations=options.max_operations,
        packages=options.packages,
        limits=Limits(seconds=options.timeout, memory=options.memory),
    )
    images = None
    if options.images is not None:
        images = read_labelled(
            options.images,
            options.image_size,
            options.num_classes,
            options.limit,
            options.seed,
        )
    verdicts = check_trial(try_submission(options.file, rules, images), rules)
    print_verdicts(str(options.file), verdicts)
    failed = [verdict.check for verdict in verdicts if verdict.status == "fail"]
    if failed:
        count = "1 check" if len(failed) == 1 else f"{len(failed)} checks"
        raise UserError(f"{options.file}: {count} failed: {', '.join(failed)}.")


if __name__ == "__main__":
    run(main, Options)
