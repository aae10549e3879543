"""A sample of benchmarks/fuzz.py: one case in forty, and what it counts as a fault."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fuzz import Case, cases, fault_of, write_good
from robust_submission.cli.errors import UserError

EVERY = 40


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    write_good(folder)
    return folder


def test_a_sample_has_no_fault(good: Path):
    everything = list(cases(seed=0, scrambles=30))
    assert len(everything) > 1000
    faults = {f"{case.path}, {case.name}": fault_of(case, good) for case in everything[::EVERY]}
    assert {name: fault for name, fault in faults.items() if fault} == {}


def test_good_files_are_good(good: Path):
    for case in {each.path: each for each in cases(seed=0, scrambles=0)}.values():
        fault = fault_of(replace(case, change=lambda path: None), good)
        assert fault == ("accepted" if case.bad else ""), case.path


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda path: None, "accepted"),
        (lambda path: {}["key"], "traceback: KeyError: 'key'"),
        (lambda path: refuse("no name"), "unnamed: no name"),
        (lambda path: refuse(f"{path}\n" + "/x" * 600), ""),  # cut
    ],
)
def test_faults_are_seen(good: Path, read: object, fault: str):
    case = Case(name="", change=lambda path: None, read=read, path="sub.csv")  # type: ignore[arg-type]
    assert fault_of(case, good) == fault


def refuse(message: str) -> None:
    raise UserError(message)
