"""Check what one distrusts in the project's container: offline, read-only, without privileges."""

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from robust_submission.cli.errors import UserError

IMAGE = "robust-submission"
STRICT = (
    *("--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--pids-limit", "1000"),
)
"""Options of `run` for a program that gets what is mounted, a temporary folder and no more."""


def find_engine() -> list[str] | None:
    """The words that start docker or podman, whichever answers.

    CONTAINER_ENGINE names another; its words are split, so that `podman --root /scratch` will do.
    """
    named = shlex.split(os.environ.get("CONTAINER_ENGINE", ""))
    for words in [named] if named else [["docker"], ["podman"]]:
        if shutil.which(words[0]) and _answers([*words, "info"]):
            return words
    return None


def _answers(words: list[str]) -> bool:
    return subprocess.run(words, capture_output=True).returncode == 0


def container_words(
    engine: Sequence[str], name: str, script: str, inputs: dict[str, Path], options: Sequence[str]
) -> list[str]:
    """The command line that runs a script of the project in a container called `name`.

    Args:
        engine: See `find_engine`.
        name: Of the container.
        script: Path in the project.
        inputs: Files and folders to mount for reading, by their paths inside.
        options: Arguments of the script.
    """
    mounts = [
        word
        for inside, path in inputs.items()
        for word in ("--mount", f"type=bind,source={path.resolve()},target={inside},readonly")
    ]
    run = (*engine, "run", "--name", name, "--pull", "never", *STRICT, *mounts)
    return [*run, "--entrypoint", "python", IMAGE, f"/app/{script}", *options]


def run_contained(script: str, inputs: dict[str, Path], options: Sequence[str]) -> None:
    """Run a script of the project in a container, to its end.

    Raises:
        UserError: nothing to mount, no engine, or the engine or the script fails.
    """
    for path in inputs.values():
        if "," in str(path.resolve()):
            raise UserError(f"{path}: expected a path without a comma to mount, found one in it.")
        if not path.exists():
            raise UserError(f"{path}: expected a file or folder, found nothing there.")
    engine = find_engine()
    if engine is None:
        raise UserError("--container: expected docker or podman, found neither at work.")
    name = f"{IMAGE}-{secrets.token_hex(4)}"
    try:
        status = subprocess.run(container_words(engine, name, script, inputs, options)).returncode
    finally:
        subprocess.run([*engine, "rm", "--force", name], capture_output=True)
    if status not in (0, 1):
        expected = f"the image {IMAGE} (docker build --tag {IMAGE} .) to run"
        raise UserError(f"--container: expected {expected}, found status {status} of {engine[0]}.")
    if status:
        place = next(iter(inputs.values()))
        raise UserError(f"{place}: not accepted in the container, whose last line says why.")
