"""The bar of an evaluation: what it says of work of unequal and uncertain cost."""

import re
import time

import pytest

from robust_submission.cli.numbers import SPACE, duration
from robust_submission.cli.progress import WorkBar


def test_the_pace_is_that_of_this_run_and_cheaper_parts_shrink_the_total(
    capsys: pytest.CaptureFixture[str],
):
    bar = WorkBar(hidden=False)
    with bar.over(100):
        bar.skip(50)  # done by an earlier run
        time.sleep(0.5)
        bar.tick(2)
        assert re.search(
            r" 52%.*<00:1[2-9]\n?$", capsys.readouterr().err
        )  # 48 at 2 in half a second
        with bar.part(30):
            bar.tick(10)
        with bar.part(10):
            bar.tick(90)  # more than all that was expected
        bar.name("last")
        time.sleep(0.2)
        bar.tick(8)
    assert re.search(r"last: 100%.*\n$", capsys.readouterr().err)


def test_a_hidden_bar_prints_nothing(capsys: pytest.CaptureFixture[str]):
    bar = WorkBar(hidden=True)
    with bar.over(10), bar.part(5):
        bar.name("it")
        bar.tick(3)
        bar.skip(2)
    assert capsys.readouterr() == ("", "")


def test_durations_are_rounded_up():
    found = [duration(each).replace(SPACE, " ") for each in (0.2, 89, 91, 1500, 5400, 11900, 9e4)]
    assert found == ["1 s", "89 s", "2 min", "25 min", "1.5 h", "3.4 h", "25 h"]
