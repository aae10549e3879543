"""Starting accelerate the same way in every command, and what is needed to repeat a run."""

import atexit
import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

# Parameters of mallopt, in <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_kept: list[Any] = []


def start_accelerator(**options: Any) -> Accelerator:
    """An Accelerator for the processes that python, torchrun or accelerate launch started.

    Where there is no GPU the CPU is asked for: accelerate would otherwise take each of several CPU
    processes for a run of its own, unless ACCELERATE_USE_CPU is set.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        keep_freed_memory()
    else:
        make_repeatable()
    accelerator = Accelerator(cpu=on_cpu, **options)
    if torch.distributed.is_initialized():
        _kept.append(torch.distributed.group.WORLD)
        atexit.register(_let_go)
    return accelerator


def _let_go() -> None:
    """Be the last to let go of the process group, while Python still runs; gloo's threads then end.

    Were DistributedDataParallel the last, gloo would join, with Python's lock held, a thread that
    may wait for the lock (torch 2.11; github.com/pytorch/pytorch/issues/56297). After Python's end
    that thread would find no lock to take and abort the process.
    """
    gc.collect()
    _kept.clear()


def make_repeatable() -> None:
    """Have GPUs, if none was used yet, give the same bits each time, at full float32 precision.

    torch would also fill all new memory, for what reads it unwritten: nothing here does, and an
    attack's step on small images would take a quarter longer.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def keep_freed_memory() -> None:
    """Have what tensors free kept for the next ones, in large pages, as long as the process lives.

    A network on a CPU frees and asks for the same large blocks in every layer. glibc would give
    each back to the system and get it anew, zeroed page by page. Does nothing with another C
    library; large pages are Linux's. (`python benchmarks/peak.py` measures it.)
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 * 2**20)


def release_freed_memory() -> None:
    """Give back what was kept, between pieces of work whose tensors differ in size.

    A freed block fits one of another size badly: what is kept would grow without end.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


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
