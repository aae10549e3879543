"""Write a package only once a separate process has loaded it and found the checkpoint's logits."""

import shutil
from pathlib import Path

import numpy as np

from robust_submission.checker.checks import check_trial
from robust_submission.checker.host import Images, Rules, try_submission
from robust_submission.checker.probes import Stage
from robust_submission.cli.errors import UserError, log
from robust_submission.cli.files import atomic_write, scratch_folder
from robust_submission.data.images import resize_image
from robust_submission.data.sources import open_run_data, open_source, read_recipe
from robust_submission.models.classifier import RobustClassifier
from robust_submission.packaging.export import checkpoint_logits, choose_writer

LOGIT_TOLERANCE = 1e-4
"""The largest difference of a logit that is accepted."""


def proof_images(
    folder: Path | None, checkpoint: Path, limit: int, image_size: int
) -> tuple[np.ndarray, str]:
    """At most `limit` images, spread evenly over their source.

    Args:
        folder: Of images; without it, the training images of the run, or noise where `checkpoint`
            is not a run folder.
        checkpoint: A run folder, or any folder of a checkpoint.
        limit: How many images.
        image_size: The side that they are resized to.

    Returns:
        The pixels, uint8 (N, S, S, 3), RGB, and a description of the images.

    Raises:
        UserError: see `open_source` and `open_run_data`.
    """
    if folder is not None:
        source, description = open_source("images", folder), f"images of {folder}"
    elif (checkpoint / "recipe.yaml").is_file():
        source, description = open_run_data(checkpoint, "train"), "training images of the run"
    else:
        shape = (limit, image_size, image_size, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return noise, "images of noise (--images for real ones)"
    places = np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int)
    skips, pixels = folder is None and _skips_bad(checkpoint), list[np.ndarray]()
    for place in places.tolist():
        try:
            pixels.append(resize_image(source.image(place), image_size))
        except UserError as error:
            if not skips:
                raise
            log.warning("skipped: %s", error)  # as in the run
    if not pixels:
        raise UserError(f"{checkpoint}: expected training images that can be read, found none.")
    return np.stack(pixels), description


def _skips_bad(checkpoint: Path) -> bool:
    return bool(read_recipe(checkpoint, "--images")["data"].get("skip_bad"))


def write_package(
    model: RobustClassifier, out: Path, pixels: np.ndarray, rules: Rules
) -> tuple[float, str]:
    """Write `out`, a .zip or .onnx file, if it passes every check and gives the model's logits.

    Returns:
        The largest difference of a logit, and the package's size and budget in a line.

    Raises:
        UserError: the model cannot be written so, a check failed, or a logit differs by more than
            `LOGIT_TOLERANCE`. `out` then keeps its former content.
    """
    write = choose_writer(out)
    with scratch_folder("package-") as folder:
        draft = folder / f"draft{out.suffix.lower()}"
        write(model, draft)
        trial = try_submission(draft, rules, Images(pixels=pixels), logits=True)
        failed = [verdict for verdict in check_trial(trial, rules) if verdict.status == "fail"]
        if failed:
            words = [f"{one.check}: expected {one.expected}, found {one.found}." for one in failed]
            raise UserError(f"{out}: not written: " + "\n".join(words[:3]))
        assert trial.result and trial.result.parameters is not None  # a check fails without them
        if error := trial.result.errors.get(Stage.LOGITS):
            found = f"{error.kind}: {error.message}"
            raise UserError(f"{out}: not written: expected the logits of all images, found {found}")
        found, expected = np.asarray(trial.result.logits), checkpoint_logits(model, pixels)
        same = found.shape == expected.shape
        difference = float(np.abs(found - expected).max()) if same else np.inf
        if not difference <= LOGIT_TOLERANCE:
            raise UserError(
                f"{out}: not written: expected the checkpoint's logits within {LOGIT_TOLERANCE:g}, "
                f"found a difference of {difference:.1e}."
            )
        with atomic_write(out) as temporary:
            shutil.copyfile(draft, temporary)
    return difference, (
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, "
        f"{trial.result.parameters / 1e6:.2f} M parameters, "
        f"{max(trial.result.operations.values()) / 1e9:.3g} G operations"
    )
