"""Probes that both workers make: images in, properties of the outputs out.

Imported in the bounded process, which has numpy but no other package for certain.
"""

import json
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from robust_submission.checker.result import (
    Counter,
    Outputs,
    ProbeError,
    Reactions,
    Stage,
    TrialRequest,
    TrialResult,
)

Found = TypeVar("Found")
BatchRunner = Callable[[np.ndarray], np.ndarray]
"""Images (N, 3, S, S), BGR, 0 to 1, to outputs (N, ...)."""
BATCH = 16


class Probes:
    """Makes probes one by one and records what each finds, or the error that it raises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.request = TrialRequest(**json.loads((folder / "request").read_bytes()))
        self.result = TrialResult()

    def attempt(self, stage: Stage, probe: Callable[[], Found]) -> Found | None:
        """What the probe returns; None if it raised, with the error recorded under `stage`."""
        with (self.folder / "stage").open("a") as file:
            file.write(f"{stage}\n")
        try:
            return probe()
        except BaseException as error:  # submitted code may raise anything, SystemExit included
            self.result.errors[stage] = describe_error(error, self.request.submission)
            return None

    @cached_property
    def images(self) -> np.ndarray:
        """The images to try, float32 (N, 3, S, S), BGR, 0 to 1."""
        return request_images(self.request)

    def count(self, counter: Counter, probe: Callable[[], float]) -> None:
        """Record multiply-adds per image."""
        stage = Stage.PTFLOPS if counter == "ptflops" else Stage.OPERATIONS
        if (found := self.attempt(stage, probe)) is not None:
            self.result.operations[counter] = found

    def probe_outputs(self, run: BatchRunner) -> bool:
        """Probe what the images give; whether that is one row of numbers per image."""
        images, result = self.images, self.result
        result.outputs = self.attempt(Stage.OUTPUTS, lambda: describe_outputs(run, images))
        if result.outputs is None or len(result.outputs.shape) != 2:
            return False
        if self.request.logits:
            result.logits = self.attempt(Stage.LOGITS, lambda: run(images).tolist())
        moved = self.attempt(Stage.STABILITY, lambda: measure_stability(run, images[:4]))
        result.repeat, result.batch = moved or (None, None)
        if self.request.labelled:
            result.reactions = self.attempt(Stage.REACTIONS, lambda: find_reactions(run, images))
        return True

    def write(self) -> None:
        """Write the result, whole or not at all."""
        temporary = self.folder / "result.part"
        temporary.write_text(json.dumps(asdict(self.result)))
        temporary.replace(self.folder / "result")


def describe_error(error: BaseException, submission: str) -> ProbeError:
    """The error in words short enough for a table."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [each for each in frames if each.filename.startswith(submission)]
    message = " ".join(str(error).split())[:300]
    memory = isinstance(error, MemoryError) or "allocate" in message
    return ProbeError(
        kind="MemoryError" if memory else type(error).__name__,
        message=message,
        place=f"{Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else "",
        module=str(getattr(error, "name", "") or ""),
    )


def request_images(request: TrialRequest) -> np.ndarray:
    """The given images as the challenge feeds them; patches of colour if there are none."""
    if request.images is not None:
        pixels = np.load(request.images, allow_pickle=False)  # uint8 (N, S, S, 3), RGB
        ordered = np.ascontiguousarray(pixels[..., ::-1].transpose(0, 3, 1, 2))
        return ordered.astype(np.float32) / 255
    side = request.image_size
    coarse = np.random.default_rng(0).random((8, 3, 7, 7), dtype=np.float32)
    rows = np.arange(side) * 7 // side
    return np.ascontiguousarray(coarse[:, :, rows][:, :, :, rows])


def describe_outputs(run: BatchRunner, images: np.ndarray) -> Outputs:
    """Shape, type and range for the first and last image, and for black and white."""
    logits = run(images[[0, -1]])
    summed = logits.ndim == 2 and np.abs(logits.astype(float).sum(1) - 1).max() < 1e-3
    extremes = [np.isfinite(run(np.full_like(images[:1], level))).all() for level in (0, 1)]
    return Outputs(
        shape=list(logits.shape),
        dtype=str(logits.dtype),
        finite=bool(np.isfinite(logits).all()),
        probabilities=bool(summed and logits.min() >= 0),
        extremes=bool(np.all(extremes)),
    )


def output_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference, as a share of the largest output (at least 1)."""
    worst = np.nan_to_num(np.abs(first - second), nan=np.inf).max()
    return float(worst / max(1.0, np.abs(first).max()))


def measure_stability(run: BatchRunner, images: np.ndarray) -> tuple[float, float]:
    """How much outputs change between calls, and with the other images in the batch."""
    first = run(images)
    alone = np.concatenate([run(image[None]) for image in images])
    repeat = max(output_difference(first, run(images)) for _ in range(2))
    return repeat, output_difference(first, alone)


def find_reactions(run: BatchRunner, images: np.ndarray) -> Reactions:
    """Predicted labels for the images as they are, in RGB order, and scaled to 0 to 255."""
    logits = run(images)
    return Reactions(
        bgr=logits.argmax(1).tolist(),
        rgb=run(np.ascontiguousarray(images[:, ::-1])).argmax(1).tolist(),
        bgr255=run(images * np.float32(255)).argmax(1).tolist(),
        finite=bool(np.isfinite(logits).all()),
        grey=bool(np.abs(images - images[:, ::-1]).max() < 1e-6),
    )
