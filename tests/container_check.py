"""Build the container twice, compare the two, and predict in it: the bytes must be predict.py's.

    python tests/container_check.py

Uses docker or podman, whichever answers; CONTAINER_ENGINE names another (words are split, so that
`podman --root /scratch` will do). Where there is none it says so and does nothing.
"""

import hashlib
import shlex
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from PIL import Image

from robust_submission.checker.container import STRICT, find_engine
from robust_submission.cli.command import run
from robust_submission.data.sources import open_source
from robust_submission.models.classifier import RobustClassifier

ROOT = Path(__file__).parents[1]
TAGS = ("robust-submission:check", "robust-submission:check-again")
ANYONE = ("--user", "12345:12345")
IMAGES = 40
Member = tuple[int, int, int, str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A check of the container."""

    build: bool = True
    """Build the images; without, those of the last time are compared and run."""


def contents(archive: IO[bytes]) -> dict[str, Member]:
    """Mode, owner and content of every file of an exported container."""
    found = dict[str, Member]()
    with tarfile.open(fileobj=archive, mode="r|") as members:
        for each in members:
            content = each.linkname
            if each.isfile():
                file = cast("IO[bytes]", members.extractfile(each))
                content = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
            found[each.name] = (each.mode, each.uid, each.gid, content)
    return found


def image_contents(engine: list[str], tag: str) -> dict[str, Member]:
    """Those of a container of the image that never ran."""
    made = subprocess.run([*engine, "create", tag], check=True, capture_output=True, text=True)
    name = made.stdout.strip()
    try:
        with subprocess.Popen([*engine, "export", name], stdout=subprocess.PIPE) as process:
            return contents(cast("IO[bytes]", process.stdout))
    finally:
        subprocess.run([*engine, "rm", name], check=True, capture_output=True)


def compare(first: dict[str, Member], second: dict[str, Member]) -> None:
    """Raise ValueError unless both have the same files."""
    names = sorted(first.keys() | second.keys())
    different = [name for name in names if first.get(name) != second.get(name)]
    if different:
        raise ValueError(
            f"{TAGS[1]}: expected the files of {TAGS[0]}, found {len(different)} others:\n"
            + "\n".join(different[:20])
        )


def prepare(folder: Path) -> None:
    """A small checkpoint, some images, and a folder that anyone may write to."""
    torch.manual_seed(0)
    names = [str(digit) for digit in range(10)]
    model = RobustClassifier(class_names=names, backbone="test_convnext", image_size=32)
    model.save_pretrained(folder / "checkpoint")
    source = open_source("digits", split="test")
    for name in ("images", "inside", "outside"):
        (folder / name).mkdir()
    for index in range(IMAGES):
        Image.fromarray(source.image(index)).save(folder / "images" / f"{index}.png")
    folder.chmod(0o755)
    for file in (folder / "checkpoint").iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    (folder / "inside").chmod(0o777)


def predict(engine: list[str], folder: Path) -> None:
    """Predict in the container and outside of it.

    Raises:
        ValueError: the two files differ.
    """
    mounts = [("checkpoint", "/checkpoint:ro"), ("images", "/in:ro"), ("inside", "/out")]
    volumes = [word for name, place in mounts for word in ("-v", f"{folder / name}:{place}")]
    options = ("--checkpoint", "/checkpoint", "--images", "/in", "--out", "/out/sub.csv")
    words = [*engine, "run", *STRICT, *ANYONE, *volumes, TAGS[0], *options, "--probabilities"]
    subprocess.run(words, check=True)
    script = str(ROOT / "inference/predict.py")
    outside = ("--checkpoint", folder / "checkpoint", "--images", folder / "images")
    out = ("--out", folder / "outside/sub.csv", "--probabilities")
    subprocess.run([sys.executable, script, *map(str, (*outside, *out))], check=True)
    files = [(folder / name / "sub.csv").read_bytes() for name in ("outside", "inside")]
    if files[0] != files[1]:
        raise ValueError("expected the bytes of predict.py outside, found others inside.")


def container_check(options: Options) -> None:
    """Build twice, compare, run.

    Raises:
        ValueError: the builds, or the predictions, differ, or a step fails.
    """
    engine = find_engine()
    if engine is None:
        print("container-check: skipped, as neither docker nor podman answers here.")
        return
    try:
        for tag in TAGS if options.build else ():
            print(f"building {tag}", flush=True)
            subprocess.run([*engine, "build", "--no-cache", "--tag", tag, str(ROOT)], check=True)
        first, second = (image_contents(engine, tag) for tag in TAGS)
        compare(first, second)
        print(f"built twice: the same {len(first)} files", flush=True)
        with tempfile.TemporaryDirectory(prefix="container-") as folder:
            prepare(Path(folder))
            predict(engine, Path(folder))
        print(f"predicts offline, read-only, as another user: same bytes for {IMAGES} images")
        trained = [*engine, "run", *STRICT, *ANYONE, "--entrypoint", "train", TAGS[0], "--help"]
        subprocess.run(trained, check=True, stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{shlex.join(error.cmd)}: ended with {error.returncode}.") from error


if __name__ == "__main__":
    run(container_check, Options)
