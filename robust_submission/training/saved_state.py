"""The states of a run on disk, for --resume: complete or not there, and proved by their digests.

    state/epoch-0003/                everything that --resume needs, after three whole epochs
    state/epoch-0003-step-000120/    the same, 120 steps later
    state/epoch-0003/manifest.json   the SHA-256 of each other file

The last two are kept: if the last one is damaged, a run can continue from the one before it.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from robust_submission.cli.documents import read_json, validated
from robust_submission.cli.errors import UserError

DAMAGED = (
    *(OSError, RuntimeError, ValueError, LookupError),
    *(SafetensorError, EOFError, pickle.UnpicklingError),
)
"""What torch, pickle, safetensors and json raise for a damaged state."""
_MANIFEST = "manifest.json"
_STATE = re.compile(r"epoch-\d{4,}(-step-\d{6,})?")


def saved_states(folder: Path) -> list[Path]:
    """The complete states in a folder, the newest last."""
    found = folder.iterdir() if folder.is_dir() else ()
    states = (path for path in found if path.is_dir() and _STATE.fullmatch(path.name))
    return sorted(states, key=_position)


def _position(state: Path) -> list[int]:
    """The epoch and the step in the name of a state, compared as numbers in long runs."""
    return [int(number) for number in re.findall(r"\d+", state.name)]


def complete_state(partial: Path, name: str) -> None:
    """Name a state whose files are all written, and remove all but it and the one before it."""
    (partial / _MANIFEST).write_text(json.dumps(_digests(partial), indent=1) + "\n")
    for path in filter(Path.is_file, partial.rglob("*")):
        with path.open("rb") as written:
            os.fsync(written.fileno())
    complete = partial.rename(partial.with_name(name))
    states = saved_states(partial.parent)
    place = states.index(complete)
    for other in states[: max(place - 1, 0)] + states[place + 1 :]:
        shutil.rmtree(other)


def check_state(state: Path) -> None:
    """Raise UserError unless a state has the files that were saved, byte for byte."""
    place = state / _MANIFEST
    saved = validated(dict[str, str], read_json(place, "the digests of a state's files"), place)
    found = _digests(state)
    for name in sorted(saved | found):
        if saved.get(name) != found.get(name):
            expected, other = "the file that was saved", "other bytes"
            if name not in saved:
                expected, other = "nothing there", "a file that was not saved"
            actual = other if name in found else "nothing there"
            raise UserError(f"{state / name}: expected {expected}, found {actual}.")


def _digests(state: Path) -> dict[str, str]:
    """SHA-256 of each file but the manifest, by its path in the state."""
    found = dict[str, str]()
    for path in filter(Path.is_file, sorted(state.rglob("*"))):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(state).as_posix()] = digest
    found.pop(_MANIFEST, None)
    return found
