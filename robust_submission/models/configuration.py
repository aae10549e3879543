"""The configuration of a classifier and of a TRN, as config.json holds it, checked by pydantic.

Types, ranges and lengths are checked before anything is built: a checkpoint may be a stranger's.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from robust_submission.models.trn.gradient_map import Estimator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST_ARGUMENT, MOST_LAYERS = 10_000, 200
"""Of a whole number among a backbone's arguments, and of one that counts layers or blocks."""
_NOT_THE_SHAPE = {
    *("cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cfg"),
    *("feature_cls", "features_only", "in_chans", "kwargs_filter", "model_cfg", "no_jit"),
    *("num_classes", "out_indices", "pruned", "scriptable", "state_dict", "strict"),
}
"""Arguments of timm that load a file, choose where to compute, or change what the model takes and
returns; as do all that begin with pretrained."""


def _shaping(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, if they do no more than shape the network."""
    for name, value in arguments.items():
        _check_argument(name, value, levels=3)
    return arguments


def _check_argument(name: str, value: object, levels: int) -> None:
    """Raise ValueError for an argument, or one inside it, that is not allowed."""
    if name in _NOT_THE_SHAPE or name.startswith("pretrained"):
        raise ValueError(f"arguments that shape the network, not {name}")
    if isinstance(value, Mapping | list | tuple) and levels:
        inner = value.items() if isinstance(value, Mapping) else ((name, each) for each in value)
        for key, each in inner:
            _check_argument(str(key), each, levels - 1)
    elif isinstance(value, bool | str | None):
        pass
    elif isinstance(value, int | float):
        counts = any(word in name for word in ("depth", "layers", "blocks"))
        most = MOST_LAYERS if counts else LARGEST_ARGUMENT
        if not abs(value) <= most:  # also for NaN
            raise ValueError(f"at most {most:,} as {name}")
    else:
        raise ValueError(f"a number, a text, or a list or group of few levels of them as {name}")


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Width = Annotated[int, Field(ge=1, le=8192)]
Depth = Annotated[int, Field(ge=0, le=MOST_LAYERS)]
Side = Annotated[int, Field(ge=1, le=8192)]
NumClasses = Annotated[int, Field(ge=1, le=10**6)]
Mean = Annotated[float, Field(ge=-1e3, le=1e3)]
Deviation = Annotated[float, Field(gt=0, le=1e3)]
Stem = Literal["patch", "conv"]
Stride = Annotated[int, Field(ge=1, le=64)]


class SurrogateArguments(_Arguments):
    """Arguments of `Surrogate`."""

    num_classes: NumClasses
    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=16, strict=False)] = (32,)
    depth: Depth = 2
    stride: Stride = 2


class TRNArguments(_Arguments):
    """Arguments of `TRN`."""

    channels: Literal[1, 3] = 3
    width: Width = 48
    depth: Annotated[int, Field(ge=1, le=MOST_LAYERS)] = 4
    stride: Stride = 2
    streams: Literal["both", "image", "gradient"] = "both"
    fusion: Literal["fusion", "concatenation"] = "fusion"
    estimator: Estimator = "predicted"
    top_k: NumClasses | None = None
    surrogate: SurrogateArguments | None = None


class ResizePadArguments(_Arguments):
    """Arguments of `RandomResizePad` beside the size."""

    min_size: Side
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0


class ClassifierArguments(_Arguments):
    """Arguments of `RobustClassifier` with a backbone of timm."""

    class_names: Annotated[list[str], Field(min_length=1, max_length=10**6, strict=False)]
    backbone: str = "convnext_tiny"
    backbone_args: Annotated[dict[str, Any], AfterValidator(_shaping)] | None = None
    stem: Stem = "patch"
    image_size: Side = 224
    mean: Annotated[tuple[Mean, Mean, Mean], Field(strict=False)] = IMAGENET_MEAN
    std: Annotated[tuple[Deviation, Deviation, Deviation], Field(strict=False)] = IMAGENET_STD
    conceal: bool = True
    randomize: ResizePadArguments | None = None
    restore: TRNArguments | None = None
