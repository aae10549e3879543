"""What the host asks a worker for and what the worker answers, as dataclasses that cross as JSON.

Both processes import this file, so it needs the standard library alone. The host parses the answer
strictly with pydantic: code of the submission ran in the process that wrote it.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Literal


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
