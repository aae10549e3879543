"""Pack a checkpoint as the challenge's Phase II takes it, and prove the package before it is there.

    python submission/package.py --checkpoint runs/quickstart --out submission.zip

submission.zip holds model.py and the weights; it needs torch and numpy alone. submission.onnx is an
ONNX file, submission.pt2 a program of torch.export. Before it is renamed to its place, the package
is unpacked in a clean folder, loaded by a fresh process as the organisers load it, checked as
check.py checks, and its logits are compared with the checkpoint's, image by image.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from robust_submission.checker.checks import check_trial
from robust_submission.checker.host import Images, Rules, try_submission
from robust_submission.checker.result import TrialResult
from robust_submission.checker.sandbox import Limits
from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, check_writable
from robust_submission.data.images import resize_image
from robust_submission.data.run_data import open_run_data
from robust_submission.data.sources import open_source
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from robust_submission.packaging.export import WRITERS

TOLERANCE = 1e-4
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """A package."""

    out: Path
    """The package: its ending, .zip, .onnx or .pt2, decides what it is."""
    checkpoint: Path = Path("runs/quickstart")
    """A run folder, or any folder with config.json and model.safetensors."""
    trn: Path | None = None
    """Run folder of a TRN to put before the classifier."""
    images: Path | None = None
    """Folder of images for the proof; by default training images of the run."""
    limit: int = 64
    """How many of them."""
    max_parameters: float = 30e6
    """Upper limit, exclusive."""
    max_operations: float = 5e9
    """Upper limit of multiply-adds per image, exclusive."""
    timeout: float = 1200.0
    """Seconds for the proof."""
    memory: float = 6e9
    """Bytes for the proof, above what torch itself takes."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UserError(f"--limit: expected at least 1, found {self.limit}.")


def proof_images(options: Options, image_size: int) -> tuple[np.ndarray, str]:
    """The pixels, uint8 (N, S, S, 3), RGB, and what they are; noise where there are no images."""
    if options.images is not None:
        source, name = open_source("images", options.images), f"images of {options.images}"
    elif (options.checkpoint / "recipe.yaml").is_file():
        source, name = open_run_data(options.checkpoint, "train"), "training images of the run"
    else:
        shape = (options.limit, image_size, image_size, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return noise, "images of noise (give --images for real ones)"
    count = min(options.limit, len(source))
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    return np.stack([resize_image(source.image(int(index)), image_size) for index in chosen]), name


@torch.inference_mode()
def reference_logits(model: RobustClassifier, pixels: np.ndarray) -> np.ndarray:
    """What the checkpoint says, (N, num_classes)."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    batches = tqdm(images.split(BATCH), unit="batch", desc="checkpoint", leave=False)
    return torch.cat([model(batch) for batch in batches]).numpy()


def prove(
    package: Path, model: RobustClassifier, pixels: np.ndarray, rules: Rules
) -> tuple[TrialResult, float]:
    """Try the package in a process of its own and compare its logits with the checkpoint's.

    Returns:
        What was found, and the largest difference of a logit.

    Raises:
        UserError: a check failed, or a logit differs by more than `TOLERANCE`.
    """
    expected = reference_logits(model, pixels)
    trial = try_submission(package, rules, Images(pixels=pixels), logits=True)
    failed = [each for each in check_trial(trial, rules) if each.status == "fail"]
    if failed:
        words = [f"{each.check}: expected {each.expected}, found {each.found}." for each in failed]
        raise UserError("not packed: " + "\n".join(words[:3]))
    assert trial.result is not None  # a check fails where there is none
    found = np.asarray(trial.result.logits)
    largest = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
    if not largest <= TOLERANCE:
        raise UserError(
            f"not packed: expected the checkpoint's logits within {TOLERANCE:g}, found a "
            f"difference of {largest:.1e}."
        )
    return trial.result, largest


def package(options: Options) -> None:
    """Write the package.

    Raises:
        UserError: see `load_checkpoint`, `zip_members` and `prove`; an ending without a writer.
    """
    write = WRITERS.get(check_writable(options.out).suffix.lower())
    if write is None:
        found = options.out.suffix or "no ending"
        expected = ", ".join(WRITERS)
        raise UserError(f"{options.out}: expected the ending {expected}, found {found}.")
    model = load_checkpoint(options.checkpoint, options.trn)
    rules = Rules(
        num_classes=len(model.class_names),
        image_size=model.image_size,
        max_parameters=options.max_parameters,
        max_operations=options.max_operations,
        limits=Limits(seconds=options.timeout, memory=options.memory),
    )
    pixels, name = proof_images(options, model.image_size)
    with tempfile.TemporaryDirectory(prefix="package-") as folder:
        draft = Path(folder) / f"draft{options.out.suffix.lower()}"
        write(model, draft)
        result, largest = prove(draft, model, pixels, rules)
        with atomic_write(options.out) as temporary:
            shutil.copyfile(draft, temporary)
    print(f"logits within {largest:.1e} of the checkpoint's on {len(pixels)} {name}")
    print(summary(options.out, result))


def summary(path: Path, result: TrialResult) -> str:
    """The package's size and budget in a line."""
    assert result.parameters is not None
    return (
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, "
        f"{result.parameters.total / 1e6:.2f} M parameters, "
        f"{max(result.operations.values()) / 1e9:.3g} G operations"
    )


if __name__ == "__main__":
    run(package, Options)
