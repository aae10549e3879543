"""Keeps results on disk as they are measured, so that an interrupted evaluation can continue.

    OUT/.journal/settings.json         everything that decides the results
    OUT/.journal/pgd-20-0f…/00003.npz  one job's arrays for one chunk of images

A file gets its name only when it is complete. The folder is removed once the report is written.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from robust_submission.attacks.base import Model
from robust_submission.cli.documents import read_json, validated
from robust_submission.cli.errors import UserError, log
from robust_submission.cli.files import atomic_write, clear_folder, lock_folder, own_folder
from robust_submission.models.digest import function_digest, module_digest

Arrays = dict[str, np.ndarray]


class Journal:
    """The results of one evaluation.

    Args:
        folder: Where they are kept; made by `prepare`.
        settings: Everything that decides a result, as plain JSON values.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = settings

    def prepare(self) -> None:
        """Make the folder and empty it of results with other settings.

        One process calls it, before any other uses the journal.

        Raises:
            UserError: the folder cannot be made, or another evaluation works there.
        """
        path = self.folder / "settings.json"
        self._lock = lock_folder(own_folder(self.folder))
        if path.exists():
            differing = self._differing(path)
            if not differing:
                parts = sum(1 for _ in self.folder.glob("*/*.npz"))
                log.info("continuing with the %d parts in %s", parts, self.folder)
                return
            log.info("starting over: %s is of another %s", self.folder, ", ".join(differing))
        clear_folder(self.folder)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")

    def _differing(self, path: Path) -> list[str]:
        try:
            found = validated(dict[str, Any], read_json(path, "settings"), path)
        except UserError:
            return ["version"]
        wanted = json.loads(json.dumps(self.settings))
        return [key for key in found | wanted if found.get(key) != wanted.get(key)]

    def load(self, job: str, chunk: int, digest: str) -> Arrays | None:
        """The arrays of a job for a chunk; None if they are missing, damaged or of other pixels."""
        path = self._path(job, chunk)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, BadZipFile):
            return None
        return found if str(found.pop("digest", None)) == digest else None

    def save(self, job: str, chunk: int, digest: str, arrays: Arrays) -> None:
        """Write the arrays of a job for a chunk of pixels named by `digest`."""
        path = self._path(job, chunk)
        own_folder(path.parent)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            everything: Any = {"digest": np.array(digest), **arrays}
            np.savez(file, **everything)

    def remove(self) -> None:
        """Remove the folder; one process calls it, after all others have finished."""
        shutil.rmtree(self.folder)

    def _path(self, job: str, chunk: int) -> Path:
        return self.folder / job / f"{chunk:05d}.npz"


def digest(parts: Iterable[bytes]) -> str:
    """Name these bytes."""
    state = hashlib.sha256()
    for part in parts:
        state.update(hashlib.sha256(part).digest())
    return state.hexdigest()[:32]


def model_digest(model: Model | None, images: torch.Tensor) -> str:
    """Name a model by what it consists of (see `models.digest`).

    A function by its outputs too; where two calls differ, by its code and what it holds alone.
    """
    if model is None:
        return "none"
    if isinstance(model, nn.Module):
        return module_digest(model)
    with torch.no_grad():
        calls = {str(model(images).float().cpu().numpy().round(3).tolist()) for _ in range(2)}
    outputs = calls.pop() if len(calls) == 1 else ""
    return digest([outputs.encode(), function_digest(model).encode()])


def code_digest(folder: Path) -> str:
    """Name the source code in a folder and those below it."""
    return digest(path.read_bytes() for path in sorted(folder.rglob("*.py")))
