"""Starts accelerate the same way in every command, and records what is needed to repeat a run."""

import atexit
import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from robust_submission.cli.errors import log

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "albumentations", "numpy", "pyautoattack")

# Parameters of mallopt, in <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_process_groups: list[Any] = []


def start_accelerator(*, float64: bool = False, **options: Any) -> Accelerator:
    """Create the Accelerator of a process started by python, torchrun or accelerate launch.

    Without a GPU, `cpu=True` is passed: otherwise accelerate treats each of several CPU processes
    as a separate run unless ACCELERATE_USE_CPU is set.

    Args:
        float64: The work needs it, so that it runs on the CPU instead of Apple's GPUs.
        options: Further arguments of Accelerator.
    """
    on_cpu = not torch.accelerator.is_available()
    if float64 and not on_cpu and torch.accelerator.current_accelerator() == torch.device("mps"):
        log.info("This needs float64, which Apple's GPUs lack: it runs on the CPU.")
        on_cpu = True
    if on_cpu:
        keep_freed_memory()
    else:
        make_repeatable()
    accelerator = Accelerator(cpu=on_cpu, **options)
    if on_cpu and accelerator.num_processes == 1:
        _warn_of_one_thread()
    if torch.distributed.is_initialized():
        _process_groups.append(torch.distributed.group.WORLD)
        atexit.register(_drop_process_group)
    return accelerator


def _warn_of_one_thread() -> None:
    """Say that a process on a CPU has one thread, which accelerate launch gives it if not told."""
    launched, cores = "ACCELERATE_DYNAMO_BACKEND" in os.environ, os.cpu_count() or 1
    if launched and torch.get_num_threads() == 1 < cores:
        log.warning(
            "accelerate launch runs this on one of %d cores; start it by python, or set "
            "OMP_NUM_THREADS=%d, for all.",
            cores,
            cores,
        )


def _drop_process_group() -> None:
    """Drop the last reference to the process group while Python runs, which ends gloo's threads.

    If DistributedDataParallel drops it last, gloo joins a thread while holding the GIL, and the
    thread may wait for the GIL (torch 2.11; github.com/pytorch/pytorch/issues/56297). If it is
    dropped after the interpreter has finalised, that thread aborts the process.
    """
    gc.collect()
    _process_groups.clear()


def make_repeatable() -> None:
    """Make GPU results repeatable bit for bit, at full float32 precision; call before first use.

    Filling uninitialised memory, which torch does by default in this mode, is switched off: nothing
    here reads such memory, and it makes an attack's step on small images a quarter slower.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def repeatable() -> Iterator[None]:
    """`make_repeatable` for a block, after which torch's settings are as before."""
    before = (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.utils.deterministic.fill_uninitialized_memory,  # pyright: ignore[reportAttributeAccessIssue]
    )
    mode = torch.get_deterministic_debug_mode()
    make_repeatable()
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before[:2]
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # pyright: ignore[reportAttributeAccessIssue]


def compile_mode(accelerator: Accelerator, *, graphs: bool = True) -> str | None:
    """The mode of torch.compile: CUDA graphs, if `graphs`, where one process has a GPU.

    With small images a GPU otherwise waits for the CPU to start each kernel. Several processes were
    not tried.
    """
    alone = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    return "reduce-overhead" if graphs and alone else None


def multiplies_bfloat16() -> bool:
    """Whether this process's device multiplies bfloat16 about as fast as float32, or faster.

    Of CPUs those with AVX-512; on others torch falls back to loops, a hundred times slower.
    """
    on_cpu = not torch.accelerator.is_available()
    return not on_cpu or torch.backends.cpu.get_cpu_capability() == "AVX512"


def keep_freed_memory() -> None:
    """Keep freed tensor memory in the process, in large pages, for the next tensors.

    A network on a CPU frees and allocates the same large blocks in every layer. By default glibc
    returns each to the system and gets it back zeroed page by page. No effect with another C
    library; large pages are Linux's. (`python benchmarks/peak.py` measures it.)
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 * 2**20)


def release_freed_memory() -> None:
    """Return kept memory to the system, between pieces of work whose tensors differ in size.

    Freed blocks rarely fit tensors of another size, so the kept memory would grow without end.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


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
