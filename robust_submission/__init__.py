"""Robust image classifiers behind GCM and TRN, and their honest evaluation.

    from robust_submission import evaluate, RobustClassifier, GCM, TRN, reveal
    from robust_submission.attacks import PGD

The names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robust_submission.api import evaluate
    from robust_submission.models.classifier import RobustClassifier, reveal
    from robust_submission.models.gcm import GCM
    from robust_submission.models.trn import TRN

__all__ = ["GCM", "TRN", "RobustClassifier", "evaluate", "reveal"]
_HOMES = {
    "GCM": "models.gcm",
    "TRN": "models.trn",
    "RobustClassifier": "models.classifier",
    "evaluate": "api",
    "reveal": "models.classifier",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
