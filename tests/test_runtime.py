"""Memory of a CPU process, and torch's settings."""

import platform
import subprocess
import sys

import pytest
import torch

from robust_submission.runtime import repeatable, start_accelerator

FREED = """
import sys, torch
from robust_submission.runtime import keep_freed_memory, release_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
if sys.argv[1] != "leave":
    keep_freed_memory()
before = resident()
large = torch.ones(64 * 2**20)
later = torch.ones(2**20)
del large
if sys.argv[1] == "release":
    release_freed_memory()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's memory")
def test_freed_memory_is_kept_for_the_next_tensor_until_it_is_released():
    kept, returned, released = (
        float(subprocess.check_output([sys.executable, "-c", FREED, word]))
        for word in ("keep", "leave", "release")
    )
    assert kept > 200 > 100 > max(returned, released)  # MiB, of 256


def test_what_needs_float64_does_not_run_on_apples_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert start_accelerator(float64=True).device.type == "cpu"


def test_torch_is_repeatable_for_a_block_only():
    def settings() -> tuple[object, ...]:
        deterministic = torch.get_deterministic_debug_mode()
        return deterministic, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark

    before = settings()
    with repeatable():
        assert settings() == (1, False, False)
    assert settings() == before
