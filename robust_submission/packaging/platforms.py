"""A checkpoint as a submission that a platform runs: Codabench, Hugging Face competitions.

Both run a program, offline, that reads images and writes submission.csv; the classifier is the zip
of `export.write_zip` inside, which needs torch and numpy alone.

- Codabench unpacks a zip into /app/program and runs the command in its file `metadata` there. It
  moves what is in a folder of the zip to the top: there is none in ours.
- A Hugging Face competition clones a repository, and runs `python script.py` in it.
"""

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from PIL import Image

from robust_submission.checker.sandbox import link_packages, namespaces
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, whole_folder, write_archive
from robust_submission.data.images import is_image
from robust_submission.models.classifier import RobustClassifier
from robust_submission.packaging.export import checkpoint_logits, write_zip
from robust_submission.prediction.schema import Layout
from robust_submission.prediction.writer import Predictions, write_predictions

Platform = Literal["codabench", "huggingface"]
PROGRAM = Path(__file__).parent / "templates" / "predict.py"
COMMAND = "python3 predict.py /app/input_data /app/output"
"""Of Codabench; it splits the line at each space."""
PROGRAM_PACKAGES = ("torch", "numpy", "pillow")
"""All that the program finds where it is proved."""
SHARE_TOLERANCE = 1e-4
"""Of a probability."""
PROGRAM_BATCH = 32
"""Images at once, as in the program: a draw that follows a TRN depends on its last bits."""


def platform_files(model: RobustClassifier, platform: Platform, layout: Layout) -> dict[str, bytes]:
    """The names and contents of the submission's files.

    Args:
        layout: Header, columns and labels of the file that the program writes; of its rows only
            whether ids have endings.

    Raises:
        UserError: see `package_config`; or all ids of a template are in one folder, whose name the
            program does not know.
    """
    folders = {str(each).rpartition("/")[0].partition("/")[0] for each in layout.ids}
    if len(folders) == 1 and (folder := folders.pop()):
        expected = "ids from the folder that all images are in"
        raise UserError(f"--template: expected {expected}, found all of them in {folder}/.")
    settings = {
        "image_size": model.image_size,
        "header": layout.header,
        "columns": [*layout.columns],
        "label_names": [*layout.label_names],
        "digits": layout.digits,
        "endings": _has_endings(layout),
    }
    with tempfile.TemporaryDirectory(prefix="package-") as folder:
        write_zip(model, Path(folder) / "model.zip")
        weights = (Path(folder) / "model.zip").read_bytes()
    start = {"script.py": PROGRAM.read_bytes()}
    if platform == "codabench":
        start = {"metadata": f"command: {COMMAND}\n".encode(), "predict.py": PROGRAM.read_bytes()}
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    return start | {"settings.json": text.encode(), "model.zip": weights}


def _has_endings(layout: Layout) -> bool:
    """Whether ids have the endings of images: other dots are a part of the name, as in v1.2_7."""
    names = (str(written) for written in layout.ids)
    return any(PurePosixPath(name).suffix and is_image(name) for name in names)


def check_place(out: Path, platform: Platform) -> Path:
    """`out` itself; UserError unless it is a zip (Codabench), or not there yet (Hugging Face)."""
    if platform == "huggingface":
        if out.exists():
            raise UserError(f"{out}: expected nothing there yet, found it.")
    elif out.suffix.lower() != ".zip":
        found = out.suffix or "no ending"
        raise UserError(f"{out}: expected the ending .zip for Codabench, found {found}.")
    return out


def write_platform(
    model: RobustClassifier,
    platform: Platform,
    out: Path,
    layout: Layout,
    pixels: np.ndarray,
    seconds: float,
) -> str:
    """Write the submission if its program, run as the platform does, gives the checkpoint's rows.

    Args:
        pixels: uint8 (N, S, S, 3), RGB: what it is tried on.
        seconds: The most that its program may take for them.

    Returns:
        A description in a line.

    Raises:
        UserError: the program failed, or a row differs; nothing is written then.
    """
    files = platform_files(model, platform, layout)
    with tempfile.TemporaryDirectory(prefix="platform-") as name:
        root = Path(name)
        _write_files(files, root / "app/program")
        names = [f"{number}.png" for number in range(len(pixels))]
        (root / "app/input_data").mkdir()
        for image, path in zip(pixels, names, strict=True):
            Image.fromarray(image).save(root / "app/input_data" / path)
        found = _run_program(root, platform, out, seconds)
        _require_rows(found, _expected_rows(model, names, pixels, layout, root), out)
        if platform == "codabench":
            with atomic_write(out) as temporary:
                write_archive(temporary, files, stored=("model.zip",))
        else:
            with whole_folder(out) as folder:
                shutil.copytree(root / "app/program", folder, dirs_exist_ok=True)
    size = sum(map(len, files.values())) / 1e6
    return f"{out}: {size:.1f} MB; its program writes the checkpoint's rows of {len(names)}"


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _run_program(root: Path, platform: Platform, out: Path, seconds: float) -> list[list[str]]:
    """The rows of the file that the program writes, without a network and with few packages."""
    for folder in ("packages", "app/output"):
        (root / folder).mkdir()
    link_packages(root / "packages", PROGRAM_PACKAGES)
    script, *paths = COMMAND.replace("/app/", f"{root}/app/").split(" ")[1:]
    if platform == "huggingface":
        script = "script.py"
    try:
        done = subprocess.run(
            [*namespaces(), sys.executable, "-S", "-B", script, *paths],
            cwd=root / "app/program",
            env={"PYTHONPATH": str(root / "packages"), "HOME": str(root), "TMPDIR": str(root)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        expected = f"its program to end within {seconds:g} s (see --timeout)"
        raise UserError(f"{out}: not written: expected {expected}, found it running.") from None
    path = root / "app/output/submission.csv"
    if done.returncode or not path.is_file():
        last = [f"status {done.returncode}", *done.stderr.strip().splitlines()][-1]
        raise UserError(f"{out}: not written: expected its program to run, found: {last}")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _expected_rows(
    model: RobustClassifier, names: list[str], pixels: np.ndarray, layout: Layout, root: Path
) -> list[list[str]]:
    padded = np.zeros(
        (-(-len(pixels) // PROGRAM_BATCH) * PROGRAM_BATCH, *pixels.shape[1:]), np.uint8
    )
    padded[: len(pixels)] = pixels
    logits = torch.from_numpy(checkpoint_logits(model, padded, PROGRAM_BATCH))[: len(pixels)]
    shares = logits.double().softmax(1).float()
    predictions = Predictions(
        images=names, labels=logits.argmax(1).numpy(), probabilities=shares.numpy()
    )
    whole = _has_endings(layout)
    ids = {name if whole else PurePosixPath(name).stem: name for name in names}
    layout = replace(layout, ids=ids)
    write_predictions(root / "expected.csv", predictions, layout)
    with (root / "expected.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _require_rows(found: list[list[str]], expected: list[list[str]], out: Path) -> None:
    def same(one: str, other: str) -> bool:
        try:
            return one == other or abs(float(one) - float(other)) <= SHARE_TOLERANCE
        except ValueError:  # no numbers
            return False

    rows = zip(found, expected, strict=False)
    right = [len(a) == len(b) and all(map(same, a, b)) for a, b in rows]
    if len(found) != len(expected) or not all(right):
        place = right.index(False) if False in right else len(right)
        shown = ",".join(expected[place]) if place < len(expected) else "no more rows"
        raise UserError(
            f"{out}: not written: expected the checkpoint's rows from its program, found another "
            f"than {shown[:80]} in line {place + 1}."
        )
