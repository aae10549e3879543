"""A run's folder: the best checkpoint, the state to resume from, metrics, recipe, provenance.

    config.json, model.safetensors   the best epoch (the average where one is kept)
    recipe.yaml, provenance.json     the resolved recipe; versions, revision, hardware
    data.json                        the classes, digests of the images, ids of those held out
    metrics.csv, summary.json        one row per epoch; the final figures
    state/epoch-0003/                everything that --resume needs, after three whole epochs
    state/epoch-0003-step-000120/    the same, 120 steps later; see saved_state
    .lock                            held by the run while it works

Each file is replaced as a whole, and a state gets its name only when it is complete: after a crash
or on a full disk the last good one is still there.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor

from robust_submission.cli.documents import read_json, read_yaml, validated
from robust_submission.cli.errors import UserError, log
from robust_submission.cli.files import (
    atomic_write,
    clear_left,
    holds_lock,
    lock_folder,
    own_folder,
    temporary_beside,
)
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import save_trn
from robust_submission.models.trn import TRN
from robust_submission.runtime import provenance
from robust_submission.training.recipe import RunRecipe, as_plain, require
from robust_submission.training.saved_state import (
    DAMAGED,
    check_state,
    complete_state,
    saved_states,
)

ACCUMULATION = {"gradient_accumulation", "auto_batch_size"}
"""Keys of a recipe that cut a step into parts, of which each has its own weight perturbation."""

MAY_CHANGE = {
    *("output", "trackers", "root", "download", "num_workers", "save_steps"),
    *("max_pixels", "check", "skip_bad", "changed", *ACCUMULATION),
}
"""Keys of a recipe that do not influence the weights: a resumed run may change them."""

IMAGES: tuple[str, ...] = ("training_images", "images", "held_out")
"""Keys of data.json that `data.changed` allows to change."""

WRITTEN = (
    *("config.json", "model.safetensors", "recipe.yaml", "provenance.json", "data.json"),
    *("metrics.csv", "summary.json", "state/partial", "state"),
    *("logs/events.out.tfevents.*", "logs"),
)
"""Patterns of what a run writes, beside `saved_states`; a folder named last is removed if nothing
else is in it."""

CHOOSES_BEST = ("val_robust_accuracy", "val_restored_accuracy", "val_accuracy")
"""The metrics that choose the best epoch: the first that was measured, where equal the next."""


def changed_key(
    former: dict[str, Any], recipe: dict[str, Any], may_change: set[str], prefix: str = ""
) -> str | None:
    """The first difference in a key that may not change, in words; None if there is none."""
    for key in [each for each in recipe | former if each not in may_change]:
        name, old, new = f"{prefix}{key}", former.get(key), recipe.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := changed_key(old, new, may_change, f"{name}."):
                return inner
        elif old != new:
            return f"{name} = {old} as before, found {new}"
    return None


def best_epoch(rows: Sequence[Mapping[str, float]]) -> int:
    """The epoch (from 1) of the highest validation accuracy, under attack if that was measured.

    The first of those that are equal in all metrics.
    """
    names = [name for name in CHOOSES_BEST if name in rows[0]]
    return 1 + max(range(len(rows)), key=lambda place: [rows[place][name] for name in names])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what writing raises into a UserError that names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: not written: {error}") from error


class RunFolder:
    """Reads and writes the files of one run; only the main process writes.

    Args:
        recipe: Names the folder, and says whether to overwrite or resume a run in it.
        is_main: Whether this is the main process.

    Attributes:
        rows: The metrics of each whole epoch.
        losses: This process's loss in each step done of the next epoch, from the loaded state.

    Raises:
        UserError: The folder holds a run that the recipe neither overwrites nor resumes, or files
            that the run reads; there is no state to resume, or one of another recipe; the folder
            cannot be made or written to; another run is using it.
    """

    def __init__(self, recipe: RunRecipe, *, is_main: bool) -> None:
        self.path = recipe.output
        self.recipe = recipe
        self.rows = list[dict[str, float]]()
        self.losses = torch.empty(0)
        for read in filter(None, recipe.inputs):
            inside = read.resolve().is_relative_to(self.path.resolve())
            require(not inside, self.path, "nothing that the run reads", read)
        if recipe.resume:
            found = self.last_state()
            require(found is not None, self.path, "a run with a state to resume", "none")
            plain = as_plain(recipe)
            perturbs = plain.get("objective", {}).get("awp_gamma")
            self._check("recipe.yaml", plain, MAY_CHANGE - ACCUMULATION if perturbs else MAY_CHANGE)
        else:
            new = recipe.overwrite or not (self.path / "recipe.yaml").exists()
            found = "one; continue it with --resume, replace it with --overwrite"
            require(new, self.path, "no run there", found)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: expected a folder that can be made: {error}.") from error
        require(os.access(self.path, os.W_OK), self.path, "a writable folder", "it read-only")
        self._lock = lock_folder(self.path) if is_main else None

    def _check(self, name: str, now: dict[str, Any], may_change: set[str]) -> None:
        """Raise UserError unless a file of the run to resume agrees with this run."""
        path = self.path / name
        read = read_json if path.suffix == ".json" else read_yaml
        former = validated(dict[str, Any], read(path, "the file of a run to resume"), path)
        if difference := changed_key(former, now, may_change):
            if difference.startswith(IMAGES):
                difference += " (data.changed allows it)"
            raise UserError(f"{path}: expected {difference}; a resumed run may not change this.")

    def begin(self, accelerator: Accelerator, ema: ModelEmaV3 | None, data: dict[str, Any]) -> None:
        """Load the last state, or remove the run to overwrite; start the trackers.

        All processes call it, once everything that could fail is built. `data` identifies the
        training images.

        Raises:
            UserError: The state is damaged, or was trained on other data.
        """
        if self.recipe.resume:
            changed = {*IMAGES} if self.recipe.data.changed else set[str]()
            self._check("data.json", data, changed)
            self._load_state(accelerator, ema)
        if accelerator.is_main_process:
            overwrite = self.recipe.overwrite and not self.recipe.resume
            if overwrite and (self.path / "recipe.yaml").exists():
                self._clear()
            clear_left(self.path / "best")
            self.write_yaml("recipe.yaml", as_plain(self.recipe))
            self.write_json("provenance.json", provenance())
            self.write_json("data.json", data)
        accelerator.init_trackers("logs")

    def _clear(self) -> None:
        """Remove what the former run wrote, and name the rest."""
        for state in saved_states(self.path / "state"):
            shutil.rmtree(state, ignore_errors=True)
        for path in (found for pattern in WRITTEN for found in self.path.glob(pattern)):
            with suppress(OSError):  # a folder that is not empty
                if not path.is_dir() or path.is_symlink():
                    path.unlink()
                elif path.parent.name == "state":
                    shutil.rmtree(path)
                else:
                    path.rmdir()
        rest = sorted(path.name for path in self.path.iterdir() if path.name != ".lock")
        if rest:
            log.info("%s: not the former run's, and left there: %s", self.path, ", ".join(rest))

    def _require_folder(self) -> None:
        """Raise UserError if the folder was deleted or replaced while the run is at work."""
        there = self._lock is None or holds_lock(self._lock, self.path)
        require(there, self.path, "the folder of this run", "it deleted or replaced")

    def add_row(self, row: dict[str, float]) -> None:
        """Add the metrics of an epoch that is done; UserError if the folder is gone."""
        self._require_folder()
        self.rows.append(row)
        self.losses = torch.empty(0)

    def write_json(self, name: str, value: object) -> None:
        self._require_folder()
        with atomic_write(self.path / name) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n")

    def write_yaml(self, name: str, value: object) -> None:
        with atomic_write(self.path / name) as temporary:
            temporary.write_text(yaml.safe_dump(value, sort_keys=False))

    def write_metrics(self) -> None:
        self._require_folder()
        with atomic_write(self.path / "metrics.csv") as temporary, temporary.open("w") as file:
            table = csv.DictWriter(file, self.rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)

    def write_best(self, model: RobustClassifier | TRN) -> None:
        """Replace the checkpoint by `model`, file by file; UserError if it cannot be written."""
        self._require_folder()
        with _writing(self.path), temporary_beside(self.path / "best", folder=True) as folder:
            if isinstance(model, TRN):
                save_trn(model, folder)
            else:
                model.save_pretrained(folder)
            for name in ("config.json", "model.safetensors"):
                (folder / name).chmod(0o644)  # safetensors makes its files private
                (folder / name).replace(self.path / name)

    def last_state(self) -> Path | None:
        """The newest complete state."""
        return next(reversed(saved_states(self.path / "state")), None)

    def save_state(
        self, accelerator: Accelerator, ema: ModelEmaV3 | None, losses: Tensor | None = None
    ) -> None:
        """Save everything that resuming needs. All processes call it.

        Args:
            accelerator: Holds the model and the optimizer.
            ema: The average of the weights.
            losses: (steps,), this process's within an epoch; None at its end.

        Raises:
            UserError: It cannot be written; the last state is unchanged.
        """
        partial = self.path / "state" / "partial"
        if accelerator.is_main_process:
            self._require_folder()
            own_folder(partial.parent)
            shutil.rmtree(own_folder(partial))
        accelerator.wait_for_everyone()
        every_loss = None if losses is None else accelerator.gather(losses[None])
        with _writing(partial):
            accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with _writing(partial):
                if ema:
                    average = ema.module.state_dict()
                    flat = {name: tensor.contiguous() for name, tensor in average.items()}
                    save_file(flat, partial / "ema.safetensors")
                if isinstance(every_loss, Tensor):  # (processes, steps)
                    save_file({"losses": every_loss}, partial / "losses.safetensors")
                (partial / "metrics.json").write_text(json.dumps(self.rows))
                self._complete(partial, steps=0 if losses is None else len(losses))
        accelerator.wait_for_everyone()

    def _complete(self, partial: Path, steps: int) -> None:
        """Give a state its name, and remove all but it and the one before it."""
        step = f"-step-{steps:06d}" if steps else ""
        complete_state(partial, f"epoch-{len(self.rows):04d}{step}")

    def _load_state(self, accelerator: Accelerator, ema: ModelEmaV3 | None) -> None:
        """Load the newest state with `rows` and `losses`."""
        *before, state = saved_states(self.path / "state")
        advice = f"Delete {state} to continue from {before[-1].name}." if before else ""
        losses = None
        try:
            if accelerator.is_main_process:
                check_state(state)
            accelerator.load_state(str(state))
            if ema:
                ema.module.load_state_dict(load_file(state / "ema.safetensors"))
            found = read_json(state / "metrics.json", "the metrics of each epoch")
            self.rows = validated(list[dict[str, int | float]], found, state / "metrics.json")
            if (path := state / "losses.safetensors").exists():
                losses = load_file(path)["losses"]
        except UserError as error:
            raise UserError(f"{error}\n{advice}".strip()) from error
        except DAMAGED as error:
            found = (str(error) or type(error).__name__).splitlines()[0]
            message = f"{state}: expected a whole state, found it damaged: {found}\n{advice}"
            raise UserError(message.strip()) from error
        if losses is not None:
            same = len(losses) == accelerator.num_processes
            self.losses = losses[accelerator.process_index] if same else losses.mean(0)
