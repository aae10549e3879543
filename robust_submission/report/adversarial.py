"""Writes the adversarial images of an evaluation: a tensor, PNG files, and RobustBench's claim.

Images that no attack of the headline fools the model on are written as they are, at the size that
the model sees.
"""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from robust_submission.attacks.base import correct
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, whole_folder
from robust_submission.cli.numbers import percent, plural, radius
from robust_submission.data.loader import micro_batch_size
from robust_submission.evaluation.data import EvaluationData, TensorSource
from robust_submission.evaluation.results import Results
from robust_submission.evaluation.views import Views
from robust_submission.report.schema import Report

_ROUNDING = 1e-3  # of 1/255: float32 errs by less


@dataclass(frozen=True, kw_only=True)
class AdversarialImages:
    """The images of an evaluation in the order of their source."""

    ids: Sequence[str]
    clean: np.ndarray
    """float32 (n, 3, H, W), 0 to 1."""
    attacked: np.ndarray
    """The same."""
    labels: np.ndarray
    """int64 (n,)."""

    def write_tensor(self, path: Path) -> None:
        """Write a file that `torch.load` reads as one float32 tensor (n, 3, H, W), 0 to 1."""
        with atomic_write(path) as temporary:
            torch.save(torch.from_numpy(self.attacked), temporary)

    def in_eight_bits(self, norm: str, epsilon: float) -> np.ndarray:
        """uint8 (n, H, W, 3), rounded so that no image leaves its ball.

        In L-infinity to the nearest level in the ball; else towards the clean image.
        """
        clean = np.rint(255 * self.clean.astype(np.float64))
        moved = 255 * self.attacked.astype(np.float64) - clean
        if norm == "linf":
            most = np.floor(255 * epsilon + _ROUNDING)
            moved = np.rint(moved).clip(-most, most)
        else:
            moved = np.trunc(moved + _ROUNDING * np.sign(moved))
        return (clean + moved).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)

    def write_files(self, folder: Path, pixels: np.ndarray) -> None:
        """Write each image of `in_eight_bits` as a PNG file of its name, in a new folder."""
        with whole_folder(folder) as temporary:
            for name, image in zip(file_names(self.ids), pixels, strict=True):
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, format="PNG")


def file_names(ids: Sequence[str]) -> list[str]:
    """The images' names with the ending .png, added to their own where two would be the same.

    Names that lead out of a folder (/a.jpg, ../a.jpg) are of the same places inside it.
    """
    inside = [posixpath.normpath("/" + name.lstrip("/"))[1:] for name in ids]
    replaced = [str(PurePosixPath(name).with_suffix(".png")) for name in inside]
    added = [f"{name}.png" for name in inside]
    numbered = [f"{place:05d}.png" for place in range(len(ids))]
    names = (replaced, added, numbered)
    return next(each for each in names if len(set(each)) == len(ids))


def adversarial_images(
    results: Results, data: EvaluationData, image_size: int
) -> AdversarialImages:
    """The images that the results hold, beside the clean ones."""
    assert results.adversarial is not None
    order, rows = np.argsort(data.indices), np.arange(len(data.indices))
    (clean,) = data.micro_batches(rows, image_size, len(rows), 0, 1)
    return AdversarialImages(
        ids=data.source.ids[data.indices[order]].tolist(),
        clean=clean["images"].numpy()[order],
        attacked=results.adversarial[order],
        labels=results.labels[order],
    )


@dataclass(frozen=True)
class AdversarialFiles:
    """Where the adversarial images of an evaluation go; None for what is not wanted."""

    tensor: Path | None
    """A .pt file."""
    folder: Path | None
    """Of PNG files."""
    claim: Path
    """RobustBench's claim, written beside the tensor."""
    views: Views
    data: EvaluationData

    def write(self, results: Results, report: Report) -> None:
        """Write them, and print what they are worth."""
        images = adversarial_images(results, self.data, self.views.image_size)
        if self.tensor:
            images.write_tensor(self.tensor)
            with atomic_write(self.claim) as temporary:
                temporary.write_text(claim_text(report), encoding="utf-8")
            shape, total = tuple(images.attacked.shape), plural(report.data["of"], "image")
            print(f"{self.tensor}: {shape}, of {total}; claim in {self.claim}")
        if self.folder:
            headline = results.plan.main[0]
            pixels = images.in_eight_bits(headline.norm, headline.epsilon)
            images.write_files(self.folder, pixels)
            files = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            right = count_right(self.views, TensorSource(files, images.labels.tolist()))
            print(f"{self.folder}: {len(pixels)} PNG; the model gets {right} of them right")


@torch.no_grad()
def count_right(views: Views, source: TensorSource) -> int:
    """How many images the deployed model classifies correctly, a random one in its first draw."""
    size, right = micro_batch_size(views.image_size), 0
    views.set_draw(0)
    for start in range(0, len(source), size):
        batch = source.micro_batch(np.arange(len(source))[start : start + size], size)
        logits = views.model(batch["images"].to(views.device)).cpu()
        right += int(correct(logits, batch["labels"])[: batch["count"]].sum())
    return right


def claim_text(report: Report) -> str:
    """The claim of a model as RobustBench's form asks for it, as far as the report knows it."""
    if not report.measurements:
        raise UserError("expected an attack to claim robust accuracy against, found none.")
    first = report.measurements[0]
    headline = [each for each in report.measurements if each.epsilon == first.epsilon]
    attacks = ", ".join(dict.fromkeys(f"{each.attack} ({each.attacker})" for each in headline))
    images = f"{plural(report.clean.total, 'image')}, {report.data.get('part')}"
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}.get(first.norm, first.norm)
    robust = f"at most {percent(report.adaptive.value)}"
    if report.verdict != "no sign of masking":
        oblivious = percent(report.oblivious.value)
        robust += f" ({report.verdict}; {oblivious} against attackers who do not know the defence)"
    fields = {
        "Architecture": f"{report.model.get('name')}, {report.model.get('parameters')} parameters",
        "Dataset": f"{report.data.get('source')} ({images})",
        "Threat Model": norm,
        "eps": radius(first.epsilon, first.norm),
        "Clean accuracy": percent(report.clean.value),
        "Robust accuracy": robust,
        "Additional data": "(true or false)",
        "Evaluation method": f"worst case per image over {attacks}; seed {report.seed}",
        "Checkpoint and code": "(their URL)",
    }
    lines = [f"- **{name}**: {value}" for name, value in fields.items()]
    paper = ["- **Paper Title**:", "- **Paper URL**:", "- **Paper authors**:"]
    parts = ["# Paper Information", *paper, "# Leaderboard Claim(s)", "## Model 1", *lines]
    return "\n".join(parts) + "\n"
