"""Probes that both workers make, and the dataclasses in which they are asked for and answered.

Host and workers import this file; the workers' process has numpy but no other package for certain.
The dataclasses cross as JSON. The host parses the answer strictly with pydantic: code of the
submission ran in the process that wrote it.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import numpy as np

Found = TypeVar("Found")
BatchRunner = Callable[[np.ndarray], np.ndarray]
"""Images (N, 3, S, S), BGR, 0 to 1, to outputs (N, ...)."""
BATCH = 16

# Of <linux/sockios.h>, <linux/if.h>, <linux/prctl.h> and <linux/capability.h>.
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CAPABILITY_VERSION = 0x20080522


class Stage(StrEnum):
    """What a worker probes, in words for the progress bar; errors are recorded under it."""

    LOAD = "loading the model"
    PARAMETERS = "counting parameters"
    INTERFACE = "reading inputs"
    OUTPUTS = "computing outputs"
    LOGITS = "computing logits of the given images"
    STABILITY = "computing outputs again"
    REACTIONS = "computing outputs of the given images"
    MODES = "comparing eval and train mode"
    DISTRIBUTED = "running under DistributedDataParallel"
    OPERATIONS = "counting operations"
    PTFLOPS = "counting operations with ptflops"


Counter = Literal["graph", "ptflops", "dispatched"]
"""What counted operations: shapes in the ONNX graph, ptflops, or torch's dispatcher."""


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """What the host asks for."""

    submission: str
    """The folder of the unpacked package, or the ONNX file."""
    image_size: int
    threads: int
    images: str | None = None
    """A .npy file of uint8 (N, S, S, 3), RGB; None means generated patches of colour."""
    labelled: bool = False
    """Whether the host has labels for the images, so that `reactions` are wanted."""
    logits: bool = False
    """Whether the logits of the images are wanted."""


@dataclass(frozen=True, kw_only=True)
class ProbeError:
    """An exception raised by a probe."""

    kind: str
    """Name of its class."""
    message: str
    place: str
    """File and line within the submission; empty where it was raised elsewhere."""
    module: str
    """The module that could not be imported, if that was the error."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The inputs of an ONNX model."""

    inputs: int
    shape: list[int | str]
    """Of the first input; names stand for free dimensions."""
    float32: bool
    opset: int


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What two images give."""

    shape: list[int]
    dtype: str
    finite: bool
    probabilities: bool
    """Whether each row is nonnegative and sums to 1."""
    extremes: bool
    """Whether a black and a white image give finite outputs."""


@dataclass(frozen=True, kw_only=True)
class Reactions:
    """Predicted labels of the given images, in three encodings."""

    bgr: list[int]
    """As the challenge feeds them: BGR, 0 to 1."""
    rgb: list[int]
    bgr255: list[int]
    """BGR, 0 to 255."""
    finite: bool
    """Whether the outputs for `bgr` are finite."""
    grey: bool
    """Whether the images have no colour."""


@dataclass(kw_only=True)
class TrialResult:
    """What a worker found; None or empty where a probe failed or was not made."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    loaded: bool = False
    errors: dict[Stage, ProbeError] = field(default_factory=dict)
    contacts: list[str] = field(default_factory=list)
    """Hosts that the model tried to reach."""
    parameters: int | None = None
    """How many numbers the model holds."""
    trainable: int | None = None
    """How many of them require a gradient; None for ONNX."""
    interface: Interface | None = None
    outputs: Outputs | None = None
    logits: list[list[float]] | None = None
    """(N, num_classes)."""
    reactions: Reactions | None = None
    repeat: float | None = None
    """Largest difference between two calls, as a share of the largest output."""
    batch: float | None = None
    """The same between an image alone and in a batch."""
    modes: float | None = None
    """The same between eval and train mode."""
    distributed: bool | None = None
    """True if a forward pass through DistributedDataParallel and DataParallel worked."""
    operations: dict[Counter, float] = field(default_factory=dict)
    """Multiply-adds per image."""
    uncounted: list[str] = field(default_factory=list)
    """ONNX operators that may multiply but are not counted."""


class Probes:
    """Makes probes one by one and records what each finds, or the error that it raises."""

    def __init__(self, folder: Path, request: TrialRequest) -> None:
        self.folder, self.request = folder, request
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
        """The given images as the challenge feeds them; patches of colour if there are none.

        float32 (N, 3, S, S), BGR, 0 to 1.
        """
        if self.request.images is not None:
            pixels = np.load(self.request.images, allow_pickle=False)  # uint8 (N, S, S, 3), RGB
            ordered = np.ascontiguousarray(pixels[..., ::-1].transpose(0, 3, 1, 2))
            return ordered.astype(np.float32) / 255
        side = self.request.image_size
        coarse = np.random.default_rng(0).random((8, 3, 7, 7), dtype=np.float32)
        rows = np.arange(side) * 7 // side
        return np.ascontiguousarray(coarse[:, :, rows][:, :, :, rows])

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


def run_worker(probe: Callable[[Probes], object]) -> None:
    """Bound this process, probe, write the result, and end: all that a worker does when started.

        python -S -P -B -m robust_submission.checker.worker FOLDER BYTES < EXCHANGE

    FOLDER/packages holds all that may be imported besides the standard library, FOLDER/code this
    package. From here on nothing of this package can be imported any more: a submission that
    imports it, or that has modules of the same names, behaves as it would elsewhere. EXCHANGE, a
    file, holds a line that the result must begin with, and the request; the result replaces them.
    """
    folder = Path(sys.argv[1])
    sys.path.remove(str(folder / "code"))
    del os.environ["PYTHONPATH"]
    package = __name__.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    exchange = os.fdopen(os.dup(0), "r+b")  # which programs that the model starts do not get
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    secret, request = exchange.readline(), exchange.read()
    exchange.seek(0)
    exchange.truncate()
    _give_up_rights()
    _limit_memory(int(sys.argv[2]))  # what the packages took is not counted
    probes = Probes(folder, TrialRequest(**json.loads(request)))
    probe(probes)
    exchange.write(secret + json.dumps(asdict(probes.result)).encode())
    exchange.flush()
    os._exit(0)  # threads that the model left behind must not keep the process alive


def _give_up_rights() -> None:
    """Start the loopback device, which DistributedDataParallel needs; then keep no capability.

    The first user of a namespace has all of them, and could see the processes outside. Also end
    with the parent.
    """
    with socket.socket(type=socket.SOCK_DGRAM) as device, contextlib.suppress(PermissionError):
        up = struct.pack("16sH14x", b"lo", _IFF_UP)
        fcntl.ioctl(device, _SIOCSIFFLAGS, up)  # refused outside: it is up there
    libc = ctypes.CDLL(None, use_errno=True)
    none = (ctypes.c_uint32 * 6)()
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), none)


def _limit_memory(room: int) -> None:
    """Let this process grow by `room` bytes and write no file above 1 GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


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
