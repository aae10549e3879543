"""Results on disk as they come, so that an interrupted evaluation goes on where it was.

    OUT/.journal/settings.json         what decides every result
    OUT/.journal/pgd-20-0f…/00003.npz  one job's arrays for one chunk of images

A file appears under its name only when it is whole. The folder is removed once the report stands.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from robust_submission.attacks.base import Model
from robust_submission.cli.files import atomic_write, clear_folder, lock_folder

Arrays = dict[str, np.ndarray]


class Journal:
    """The results of one evaluation.

    Args:
        folder: Where they stand; made by `prepare`.
        settings: All that decides a result, as plain JSON values.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = settings

    def prepare(self) -> str:
        """Make the folder, emptied of other settings' results; by one process, before all others.

        Returns:
            A line for the user, empty for a fresh start.

        Raises:
            UserError: another evaluation works there.
        """
        path, word = self.folder / "settings.json", ""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        if path.exists():
            differing = self._differing(path)
            if not differing:
                parts = sum(1 for _ in self.folder.glob("*/*.npz"))
                return f"going on with the {parts} parts in {self.folder}"
            word = f"starting over: {self.folder} is of another {', '.join(differing)}"
        clear_folder(self.folder)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
        return word

    def _differing(self, path: Path) -> list[str]:
        try:
            found = dict[str, Any](json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return ["version"]
        wanted = json.loads(json.dumps(self.settings))
        return [key for key in found | wanted if found.get(key) != wanted.get(key)]

    def load(self, job: str, chunk: int, digest: str) -> Arrays | None:
        """The arrays of a job for a chunk, unless they are missing, damaged or of other pixels."""
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
        path = self._path(job, chunk)
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            everything: Any = {"digest": np.array(digest), **arrays}
            np.savez(file, **everything)

    def remove(self) -> None:
        """Remove everything; by one process, after all others."""
        shutil.rmtree(self.folder)

    def _path(self, job: str, chunk: int) -> Path:
        return self.folder / job / f"{chunk:05d}.npz"


def digest(parts: Iterable[bytes]) -> str:
    """A name for these bytes."""
    state = hashlib.sha256()
    for part in parts:
        state.update(hashlib.sha256(part).digest())
    return state.hexdigest()[:32]


def model_digest(model: Model | None, images: torch.Tensor) -> str:
    """A name for a model: its structure and tensors, or its outputs where it is no module."""
    if model is None:
        return "none"
    if not isinstance(model, nn.Module):
        with torch.no_grad():
            return digest([str(model(images).float().cpu().numpy().round(3).tolist()).encode()])
    return module_digest(model)


def module_digest(module: nn.Module) -> str:
    """A name for a module: its structure, settings and tensors, wherever and however it is run."""
    tensors = [module.state_dict()[name] for name in sorted(module.state_dict())]
    raw = (each.detach().cpu().contiguous().view(-1).view(torch.uint8) for each in tensors)
    return digest([repr(module).encode(), *(each.numpy().tobytes() for each in raw)])


def source_digest(module: str) -> str:
    """A name for the source code of an imported module; empty for another name."""
    path = getattr(sys.modules.get(module), "__file__", None)
    return digest([Path(path).read_bytes()]) if path else ""


def code_digest(*folders: Path) -> str:
    """A name for the source code that decides results."""
    return digest(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))
