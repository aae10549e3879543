"""What is needed to repeat a run: versions, source revision, hardware."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "albumentations", "numpy", "pyautoattack")


def git_revision() -> str:
    """The commit of this source tree, with "+changes" when it differs; "unknown" outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def provenance() -> dict[str, object]:
    """Versions, git revision and hardware, as plain JSON values."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": {package: _installed(package) for package in PACKAGES},
        "git": git_revision(),
        "hardware": {
            "machine": platform.machine(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
    }
