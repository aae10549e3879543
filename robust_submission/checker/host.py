"""Open a submission, whoever made it, and try its model in a process of its own."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from robust_submission.checker.probes import Stage, TrialRequest, TrialResult
from robust_submission.checker.sandbox import Limits, Run, run_isolated
from robust_submission.checker.unpack import (
    BOUNDS,
    RefusedError,
    check_layout,
    foreign,
    unpack,
)
from robust_submission.cli.errors import UserError, printable
from robust_submission.cli.files import scratch_folder
from robust_submission.data.images import resize_image
from robust_submission.data.sources import available_splits, open_source, stratified_subset


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
class Trial:
    """All that is known of a submission, before it is checked against the rules."""

    kind: str
    """.zip or .onnx."""
    files: list[str]
    """In the archive."""
    strange: Sequence[str] = ()
    """Those of them that are neither data nor copies of this project's sources."""
    refused: RefusedError | None = None
    """Why the archive was not unpacked, or its model not run."""
    run: Run | None = None
    """How the process ended; None if there was none."""
    result: TrialResult | None = None
    """What the worker found; None if it wrote no valid result."""
    seconds: float = 0.0
    images: Images | None = None


def read_labelled(folder: Path, image_size: int, num_classes: int, limit: int, seed: int) -> Images:
    """Images and labels from a folder of class folders, or from the challenge's folder.

    Raises:
        UserError: see `open_source`; or there is not a folder for each class, and so no telling
            which classes there are.
    """
    name = "challenge" if (folder / "label.txt").is_file() else "folder"
    split = "test" if "test" in (available_splits(name, folder) or ("test",)) else "train"
    source = open_source(name, folder, split)
    assert source.labels is not None
    count = len(source.class_names or ())
    if name == "folder" and count != num_classes:
        expected = f"a folder for each of the {num_classes} classes (--num_classes)"
        raise UserError(f"{folder}: expected {expected}, found {count}.")
    chosen = stratified_subset(source.labels, limit, seed)
    pixels = [resize_image(source.image(int(index)), image_size) for index in chosen]
    return Images(pixels=np.stack(pixels), labels=source.labels[chosen])


def try_submission(
    path: Path, rules: Rules, images: Images | None = None, *, logits: bool = False
) -> Trial:
    """Unpack and try a submission, with a progress bar.

    Args:
        path: A .zip or .onnx file.
        rules: Image size, packages and limits of the trial.
        images: What to try it on; by default patches of colour.
        logits: Whether the result shall have the logits of the images.

    Raises:
        UserError: no such file, or a file of another kind.
    """
    if (kind := path.suffix.lower()) not in (".zip", ".onnx"):
        found = path.suffix or "no ending"
        raise UserError(f"{path}: expected the ending .zip or .onnx, found {found}.")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise UserError(f"{path}: expected a submission, found {found}.")
    with scratch_folder("submission-") as folder:
        try:
            submission, files = _open_submission(path, folder / "content")
            strange = foreign(submission, files) if kind == ".zip" else []
        except RefusedError as error:
            return Trial(kind=kind, files=[], refused=error)
        if images is not None:
            np.save(folder / "images.npy", images.pixels)
        threads = os.environ.get("OMP_NUM_THREADS", "")
        request = TrialRequest(
            submission=str(submission),
            image_size=rules.image_size,
            threads=int(threads) if threads.isdecimal() and int(threads) else os.cpu_count() or 1,
            images=str(folder / "images.npy") if images is not None else None,
            labelled=images is not None and images.labels is not None,
            logits=logits,
        )
        start = time.monotonic()
        (folder / "process").mkdir()
        run = _run_worker(kind, request, rules, folder / "process")
        seconds = time.monotonic() - start
    run, result = _parse(run, images)
    return Trial(
        kind=kind,
        files=files,
        strange=strange,
        run=run,
        result=result,
        seconds=seconds,
        images=images,
    )


def _open_submission(path: Path, folder: Path) -> tuple[Path, list[str]]:
    """What the worker loads, and the files that came with it."""
    if path.suffix.lower() == ".zip":
        folder.mkdir()
        files = unpack(path, folder)
        check_layout(files)
        return folder, files
    size, most = path.stat().st_size, BOUNDS.total
    if size > most:
        found = f"{size / 2**20:,.0f} MiB"
        raise RefusedError(f"at most {most / 2**20:,.0f} MiB", found, "export a smaller model")
    return path.resolve(), [path.name]


def _run_worker(kind: str, request: TrialRequest, rules: Rules, folder: Path) -> Run:
    worker, packages = "worker", rules.packages
    if kind == ".onnx":
        worker, packages = "worker_onnx", ("numpy", "onnx", "onnxruntime")
    with tqdm(total=len(Stage), unit="check", leave=False) as bar:

        def on_stage(stage: str) -> None:
            bar.set_description(printable(stage))
            bar.update()

        words = json.dumps(asdict(request))
        return run_isolated(worker, words, packages, rules.limits, folder, on_stage)


def _parse(run: Run, images: Images | None) -> tuple[Run, TrialResult | None]:
    """The result, if it is one that a worker writes; a damaged or forged one counts as none."""
    if run.result is None:
        return run, None
    try:
        result = TypeAdapter(TrialResult).validate_json(run.result, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        words = ": ".join([*map(str, first["loc"]), first["msg"]])
        return replace(run, found=f"a result that no worker writes ({words})"), None
    count = 0 if images is None else len(images.pixels)
    seen = result.reactions
    if seen and {len(seen.bgr), len(seen.rgb), len(seen.bgr255)} != {count}:
        return replace(run, found="a result that no worker writes (other images)"), None
    return run, result
