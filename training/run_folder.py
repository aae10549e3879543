"""A run's folder: the best checkpoint, the state to resume from, metrics, and what repeats it.

    config.json, model.safetensors   the best epoch (the average where one is kept)
    recipe.yaml, provenance.json     the resolved recipe; versions, revision, hardware
    metrics.csv, summary.json        one row an epoch; the final figures
    state/epoch-0003/                everything that --resume needs, the last whole epoch alone

Each file is replaced whole and a state appears under its name only when complete, so that a crash
at any moment leaves the last good one.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3

from cli.files import atomic_write
from cli.provenance import provenance
from models.classifier import RobustClassifier
from models.trn import TRN
from training.recipe import RunRecipe, as_plain

MAY_CHANGE = {"output", "trackers", "gradient_accumulation", "root", "download", "num_workers"}
"""Keys of a recipe that decide no weight, or where things are: a resumed run may set them anew."""

CHOOSES_BEST = ("val_robust_accuracy", "val_restored_accuracy", "val_accuracy")
"""The figures that choose the best epoch, the first of those that are measured."""


def changed_key(former: dict[str, Any], recipe: dict[str, Any], prefix: str = "") -> str | None:
    """The first difference in a key that decides the weights, in words; None where all agree."""
    for key in [each for each in recipe if each not in MAY_CHANGE]:
        name, old, new = f"{prefix}{key}", former.get(key), recipe[key]
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := changed_key(old, new, f"{name}."):
                return inner
        elif old != new:
            return f"{name} = {old} as before, found {new}"
    return None


class RunFolder:
    """Reads and writes the files of one run; only the main process writes.

    Args:
        recipe: Names the folder, and whether to overwrite or resume what stands there.
        is_main: Whether this process is the one that writes.

    Raises:
        ValueError: a run stands there and the recipe neither overwrites nor resumes it; there is
            no state to resume, or one of another recipe; the folder cannot be made or written to.
    """

    def __init__(self, recipe: RunRecipe, *, is_main: bool) -> None:
        self.path = recipe.output
        self.recipe = recipe
        self.rows = list[dict[str, float]]()
        if recipe.resume and self.last_state() is None:
            raise ValueError(f"{self.path}: expected a run with a state to resume, found none.")
        if recipe.resume:
            former = yaml.safe_load((self.path / "recipe.yaml").read_text())
            if difference := changed_key(former, as_plain(recipe)):
                raise ValueError(f"{self.path}: expected {difference}; resume what was begun.")
        elif (self.path / "recipe.yaml").exists():
            if not recipe.overwrite:
                raise ValueError(
                    f"{self.path}: expected no run there, found one; "
                    "go on with --resume, replace it with --overwrite."
                )
            if is_main:
                shutil.rmtree(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self.path}: expected a folder that can be made: {error}."
            ) from error
        if not os.access(self.path, os.W_OK):
            raise ValueError(f"{self.path}: expected a writable folder, found it read-only.")

    def describe(self, accelerator: Accelerator) -> None:
        """Write down what repeats the run, and begin its trackers. All processes."""
        if accelerator.is_main_process:
            self.write_yaml("recipe.yaml", as_plain(self.recipe))
            self.write_json("provenance.json", provenance())
        accelerator.init_trackers("logs")

    def best_epoch(self) -> int:
        """The epoch (from 1) of the highest validation accuracy, attacked where it is measured."""
        metric = next(name for name in CHOOSES_BEST if name in self.rows[0])
        return 1 + max(range(len(self.rows)), key=lambda place: self.rows[place][metric])

    def write_json(self, name: str, value: object) -> None:
        with atomic_write(self.path / name) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n")

    def write_yaml(self, name: str, value: object) -> None:
        with atomic_write(self.path / name) as temporary:
            temporary.write_text(yaml.safe_dump(value, sort_keys=False))

    def write_metrics(self) -> None:
        with atomic_write(self.path / "metrics.csv") as temporary:
            pd.DataFrame(self.rows).to_csv(temporary, index=False)

    def write_best(self, model: RobustClassifier | TRN) -> None:
        """Replace the checkpoint by `model`, file by file, each whole."""
        with tempfile.TemporaryDirectory(dir=self.path, prefix=".best-") as folder:
            model.save_pretrained(folder)
            for name in ("config.json", "model.safetensors"):
                (Path(folder) / name).chmod(0o644)  # safetensors keeps its files to their owner
                (Path(folder) / name).replace(self.path / name)

    def last_state(self) -> Path | None:
        """The newest complete state."""
        return max((self.path / "state").glob("epoch-*"), default=None)

    def save_state(self, accelerator: Accelerator, ema: ModelEmaV3 | None) -> None:
        """Save everything that resuming needs, under its name only when complete. All processes."""
        partial = self.path / "state" / "partial"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        if ema:
            save_file(ema.module.state_dict(), partial / "ema.safetensors")
        (partial / "metrics.json").write_text(json.dumps(self.rows))
        complete = partial.rename(partial.with_name(f"epoch-{len(self.rows):04d}"))
        for former in set(complete.parent.glob("epoch-*")) - {complete}:
            shutil.rmtree(former)

    def load_state(self, accelerator: Accelerator, ema: ModelEmaV3 | None) -> None:
        """Load the newest state; `rows` then has a row for each whole epoch behind it."""
        state = self.last_state()
        assert state is not None
        accelerator.load_state(str(state))
        if ema:
            ema.module.load_state_dict(load_file(state / "ema.safetensors"))
        self.rows = json.loads((state / "metrics.json").read_text())
