"""What the two programs that try a model share: the request, the limits, the images, the result.

Imported inside `run_isolated` only: it reads the request that the command line names, and puts the
packages that the request allows on sys.path.
"""

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUEST: dict[str, Any] = json.loads(Path(sys.argv[1]).read_bytes())
sys.path.insert(0, REQUEST["packages"])

import numpy as np  # noqa: E402  # the packages are only now on the path

BATCH = 16
VARIANTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bgr": lambda images: images,
    "rgb": lambda images: np.ascontiguousarray(images[:, ::-1]),
    "bgr255": lambda images: images * np.float32(255),
}


def begin(stage: str) -> None:
    """Tell the parent what is being done."""
    with Path(REQUEST["stage"]).open("a") as file:
        file.write(f"{stage}\n")


def limit_memory() -> None:
    """Let this process grow by the request's room and no more, and write no large file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + int(REQUEST["memory"])
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def describe_error(error: BaseException) -> dict[str, str]:
    """Kind, message and place, short enough for a table."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [each for each in frames if each.filename.startswith(REQUEST.get("folder", "\0"))]
    place = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else ""
    message = " ".join(str(error).split())[:300]
    memory = isinstance(error, MemoryError) or "allocate" in message
    return {
        "kind": "MemoryError" if memory else type(error).__name__,
        "message": message,
        "place": place,
        "module": str(getattr(error, "name", "") or ""),
    }


def attempt(results: dict[str, Any], name: str, probe: Callable[[], Any]) -> Any:
    """Keep what the probe gives, or why it gave nothing."""
    begin(name)
    try:
        results[name] = probe()
    except BaseException as error:  # a stranger's code may raise anything, SystemExit included
        results[name] = {"error": describe_error(error)}
    return results[name]


def probe_images() -> np.ndarray:
    """The parent's images, (N, 3, S, S), BGR, 0 to 1; patches of colour where it has none."""
    if REQUEST.get("images"):
        pixels = np.load(REQUEST["images"], allow_pickle=False)  # uint8 (N, S, S, 3), RGB
        ordered = np.ascontiguousarray(pixels[..., ::-1].transpose(0, 3, 1, 2))
        return ordered.astype(np.float32) / 255
    side = REQUEST["image_size"]
    coarse = np.random.default_rng(0).random((8, 3, 7, 7), dtype=np.float32)
    rows = np.arange(side) * 7 // side
    return np.ascontiguousarray(coarse[:, :, rows][:, :, :, rows])


def reactions(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> dict[str, Any]:
    """Labels for the images as they are, in RGB order, and in 0 to 255; whether the first are of
    finite outputs."""
    logits = {name: run(vary(images)) for name, vary in VARIANTS.items()}
    return {
        "labels": {name: each.argmax(1).tolist() for name, each in logits.items()},
        "finite": bool(np.isfinite(logits["bgr"]).all()),
        "grey": bool(np.abs(images - images[:, ::-1]).max() < 1e-6),
    }


def describe_outputs(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> dict[str, Any]:
    """Shape, type and range of the outputs for two images (one twice), all black and all white."""
    logits = run(images[[0, -1]])
    summed = logits.ndim == 2 and np.abs(logits.astype(float).sum(1) - 1).max() < 1e-3
    extremes = [np.isfinite(run(np.full_like(images[:1], level))).all() for level in (0, 1)]
    return {
        "shape": list(logits.shape),
        "dtype": str(logits.dtype),
        "finite": bool(np.isfinite(logits).all()),
        "probabilities": bool(summed and logits.min() >= 0),
        "extremes": bool(np.all(extremes)),
    }


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference, as a share of the largest output (at least 1)."""
    worst = np.nan_to_num(np.abs(first - second), nan=np.inf).max()
    return float(worst / max(1.0, np.abs(first).max()))


def stability(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> dict[str, float]:
    """How far outputs move with the call, and with the images beside."""
    first = run(images)
    alone = np.concatenate([run(image[None]) for image in images])
    repeat = max(difference(first, run(images)) for _ in range(2))
    return {"repeat": repeat, "batch": difference(first, alone)}


def write_result(results: dict[str, Any]) -> None:
    """Write the result, whole or not at all."""
    temporary = Path(REQUEST["result"] + ".part")
    temporary.write_text(json.dumps(results))
    temporary.replace(REQUEST["result"])
