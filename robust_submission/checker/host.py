"""Open a submission, whoever made it, and try its model in a process of its own."""

import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from robust_submission.checker.sandbox import Limits, Run, run_isolated
from robust_submission.checker.unpack import BOUNDS, RefusedError, unpack
from robust_submission.cli.errors import UserError

HERE = Path(__file__).parent
KINDS = (".zip", ".onnx", ".pt2")
NEEDLESS = (".pyc", ".pyo", ".ds_store", ".ipynb", ".log")
NEEDLESS_FOLDERS = {"__macosx", "__pycache__", ".git"}

STAGES = {
    "load": "loading the model",
    "outputs": "computing outputs",
    "stability": "computing outputs again",
    "modes": "comparing eval and train mode",
    "distributed": "running under DistributedDataParallel",
    "dispatched": "counting operations",
    "ptflops": "counting operations with ptflops",
    "operations": "counting operations",
    "reactions": "computing outputs of the given images",
    "logits": "computing outputs of the given images",
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the organisers ask for."""

    num_classes: int = 100
    image_size: int = 224
    max_parameters: float = 30e6
    max_operations: float = 5e9
    packages: tuple[str, ...] = ("torch", "numpy")
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images to try a model on."""

    pixels: np.ndarray
    """uint8 (N, S, S, 3), RGB."""
    labels: np.ndarray | None = None
    """int64 (N,)."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that was seen of a submission, before it is judged."""

    kind: str
    """.zip, .onnx or .pt2."""
    files: list[str]
    """In the archive."""
    refused: RefusedError | None = None
    """Why the archive was not unpacked, or its model not run."""
    run: Run | None = None
    """How the trial ended; None where there was none."""
    seconds: float = 0.0
    images: Images | None = None

    @property
    def results(self) -> dict[str, Any]:
        """What the trial wrote; empty where it wrote nothing."""
        return (self.run and self.run.result) or {}


def examine(
    path: Path,
    rules: Rules,
    images: Images | None = None,
    *,
    logits: bool = False,
) -> Findings:
    """Unpack and try a submission, with a progress bar.

    Args:
        path: A .zip, .onnx or .pt2 file. A .pt2 is for one's own alone: reading it is not bounded.
        rules: The limits.
        images: What to try it on; patches of colour without.
        logits: Whether `results["logits"]` is wanted for the images.

    Raises:
        UserError: no such file, or of another kind.
    """
    _check_path(path)
    request: dict[str, Any] = {"image_size": rules.image_size, "logits": logits}
    request["threads"] = _threads()
    with tempfile.TemporaryDirectory(prefix="submission-") as name:
        base, kind = Path(name).resolve(), path.suffix.lower()
        if images is not None:
            np.save(base / "images.npy", images.pixels)
            request |= {"images": str(base / "images.npy"), "labelled": images.labels is not None}
        try:
            place, files = _open(path, base / "content")
        except RefusedError as error:
            return Findings(kind=kind, files=[], refused=error)
        start = time.monotonic()
        script, packages = HERE / "worker.py", rules.packages
        if kind == ".onnx":
            script, packages = HERE / "worker_onnx.py", ("numpy", "onnx", "onnxruntime")
        with tqdm(total=len(STAGES), unit="check", leave=False) as bar:

            def on_stage(stage: str) -> None:
                bar.set_description(STAGES.get(stage, stage))
                bar.update()

            run = run_isolated(script, {**request, **place}, packages, rules.limits, on_stage)
        seconds = time.monotonic() - start
        return Findings(kind=kind, files=files, run=run, seconds=seconds, images=images)


def _check_path(path: Path) -> None:
    if path.suffix.lower() not in KINDS:
        found = path.suffix or "no ending"
        raise UserError(f"{path}: expected the ending {', '.join(KINDS)}, found {found}.")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise UserError(f"{path}: expected a submission, found {found}.")


def _open(path: Path, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Where the model is, as the request says it, and the files that came with it."""
    if path.suffix.lower() == ".zip":
        folder.mkdir()
        files = unpack(path, folder)
        _check_layout(files)
        return {"folder": str(folder)}, files
    key = "onnx" if path.suffix.lower() == ".onnx" else "program"
    return {key: str(_bounded(path).resolve())}, [path.name]


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else os.cpu_count() or 1


def _bounded(path: Path) -> Path:
    size, most = path.stat().st_size, BOUNDS.total
    if size > most:
        found = f"{size / 2**20:,.0f} MiB"
        raise RefusedError(f"at most {most / 2**20:,.0f} MiB", found, "export a smaller model")
    return path


def _check_layout(files: list[str]) -> None:
    """Raise RefusedError unless model.py lies at the top."""
    if "model.py" in files:
        return
    nested = [name for name in files if name.endswith("/model.py")]
    if nested:
        fix = "zip from inside the folder: cd FOLDER && zip -r ../submission.zip ."
        raise RefusedError("model.py at the top level", f"{nested[0]}, a folder too deep", fix)
    found = ", ".join(files[:3]) or "nothing"
    raise RefusedError("model.py at the top level", found, "add a model.py with a class Model")


def needless(files: list[str]) -> list[str]:
    """Files that no model needs."""
    return [
        name
        for name in files
        if name.lower().endswith(NEEDLESS) or NEEDLESS_FOLDERS & {*name.lower().split("/")}
    ]
