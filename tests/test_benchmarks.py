"""What the benchmarks measure with."""

import importlib
import sys
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("timing")


def test_contestants_take_turns_and_the_warm_up_is_not_counted(timing: Any):
    calls = list[str]()
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.take_turns(contestants, rounds=2, warm_up=1)
    assert calls == list("ababab")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_over_rounds_not_of_totals(timing: Any):
    seconds = {"ours": [1.0, 1.0, 10.0], "peer": [2.0, 3.0, 10.0]}
    assert timing.times_as_fast(seconds, "ours", "peer") == "2.00 (1.00 to 3.00)"


def test_start_up_is_not_part_of_a_unit(timing: Any, monkeypatch: pytest.MonkeyPatch):
    times = {"it 2": [5.0, 6.0], "it 6": [11.0, 14.0]}
    monkeypatch.setattr(timing, "take_turns", lambda *_, **__: times)
    per_unit, start_up = timing.seconds_per_unit({"it": print}, 2, 4, rounds=2)
    assert per_unit == {"it": [1.5, 2.0]}
    assert start_up == {"it": [2.0, 2.0]}


def test_peak_memory_is_the_commands(timing: Any):
    held = bytearray(300 * 2**20)  # by this process, not by the command
    usage = timing.run_command([sys.executable, "-S", "-c", "x = bytearray(100 * 2**20)"])
    assert len(held) and 100 < usage.peak < 200


def test_a_command_that_fails_says_why(timing: Any):
    with pytest.raises(RuntimeError, match="exit 3\nbad"):
        timing.run_command(["sh", "-c", "echo bad; exit 3"])
