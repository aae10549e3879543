"""What the benchmarks measure with, and what they compute on paper."""

import importlib
import sys
from typing import Any

import pytest

from tests.conftest import ROOT, run_command

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("timing")


def test_all_take_turns_and_the_warm_up_is_not_counted(timing: Any):
    calls = list[str]()
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.take_turns(contestants, rounds=2, warm_up=1)
    assert calls == list("ababab")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_over_rounds_not_of_totals(timing: Any):
    seconds = {"ours": [1.0, 1.0, 10.0], "peer": [2.0, 3.0, 10.0]}
    assert timing.times_as_fast(seconds, "ours", "peer") == "2.00 (1.00 to 3.00)"


def test_start_up_is_taken_out_of_a_unit(timing: Any, monkeypatch: pytest.MonkeyPatch):
    times = {"it, shorter": [5.0, 6.0], "it, longer": [11.0, 14.0]}
    monkeypatch.setattr(timing, "take_turns", lambda *_, **__: times)
    each, start_up = timing.seconds_per_unit({"it": (print, print)}, 2, 4, rounds=2)
    assert each == {"it": [1.5, 2.0]}
    assert start_up == {"it": [2.0, 2.0]}


def test_the_peak_is_the_commands_own(timing: Any):
    held = bytearray(300 * 2**20)  # by this process, not by the command
    usage = timing.run_command([sys.executable, "-S", "-c", "x = bytearray(100 * 2**20)"])
    assert len(held) and 100 < usage.peak < 200


def test_a_command_that_fails_says_why(timing: Any):
    with pytest.raises(RuntimeError, match="exit 3\nbad"):
        timing.run_command(["sh", "-c", "echo bad; exit 3"])


def test_the_cost_on_paper_is_a_rings(timing: Any):
    scaling = importlib.import_module("scaling")
    assumed = scaling.Assumptions(inside_latency=0, between_latency=0)
    step = scaling.model_step(assumed, 8, attacked=False, sharded=False)
    assert step.sent == pytest.approx(2 * 7 / 8 * 4 * assumed.parameters)
    assert step.communicating == pytest.approx(step.sent / assumed.inside)
    assert step.computing == pytest.approx(3 * 128 * 8.9e9 / (0.35 * 989e12))
    attacked = scaling.model_step(assumed, 8, attacked=True, sharded=False)
    assert attacked.computing == pytest.approx(step.computing * 23 / 3)


def test_the_table_on_paper_runs_alone():
    printed = run_command(BENCHMARKS / "scaling.py", "--commands", "").stdout
    assert printed.count("\n| ") == 14 and "Computed, not measured" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["scaling.py", "--commands", "adversarial", "--images", "x", "--steps", "7"],
            "--steps: expected at least 8, found 7.",
        ),
        (["growth.py", "--counts", "10,abc"], "expected growing numbers, found 10,abc."),
        (["growth.py", "--counts", "10,5"], "expected growing numbers, found 10,5."),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(words: list[str], message: str):
    done = run_command(BENCHMARKS / words[0], *words[1:])
    assert done.returncode == 1 and message in done.stderr
