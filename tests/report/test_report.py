"""The report's files: complete, equal for equal input, and true to the numbers."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from robust_submission.cli.numbers import SPACE
from robust_submission.evaluation.results import share_of
from robust_submission.report.gallery import difference, difference_factor, gallery_rows
from robust_submission.report.schema import json_text, read_report
from robust_submission.report.text import print_table
from robust_submission.report.write import write_report

FILES = [
    "epsilon.png",
    "gallery.png",
    "per_image.csv",
    "report.html",
    "report.json",
    "steps.png",
]
KINDS = ("clean", "oblivious", "adaptive")
PER_IMAGE = pd.DataFrame({"id": ["a.png", "b.png"], "label": [3, 8], "loss": [0.5, math.nan]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, example, drawn) -> Path:
    made = tmp_path_factory.mktemp("runs") / "new" / "report"
    write_report(example(), drawn(), PER_IMAGE, made)
    return made


def test_all_files_are_there_and_no_other(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_equal_input_gives_equal_bytes_without_a_date_or_version(folder, tmp_path, example, drawn):
    write_report(example(), drawn(), PER_IMAGE, tmp_path)
    for name in FILES:
        content = (folder / name).read_bytes()
        assert content == (tmp_path / name).read_bytes(), name
        assert b"atplotlib" not in content, name
        assert b"tIME" not in content, name
        assert b"tEXt" not in content, name


def test_json_is_the_report(folder, example):
    text = (folder / "report.json").read_text(encoding="utf-8")
    of_two_classes = {"auc": None, "corrupted_auc": None}
    assert json.loads(text) | of_two_classes == json.loads(json.dumps(asdict(example())))
    assert text.startswith('{\n  "model"')
    assert text.endswith("}\n")
    assert read_report(folder) == example()


def test_a_report_of_another_schema_is_refused_by_its_number(tmp_path, example):
    text = json_text(example()).replace('"attacker"', '"through"')
    (tmp_path / "report.json").write_text(text.replace('"schema": 4', '"schema": 3'))
    with pytest.raises(ValueError, match="expected schema 4, found 3; evaluate again"):
        read_report(tmp_path)


def test_a_printed_report_is_a_summary(example):
    assert repr(example()).replace(SPACE, " ").splitlines() == [
        "Report of resnet18-gcm on 1,000 images",
        "clean accuracy 95.0 %",
        "robust accuracy 94.0 % (oblivious), at most 0.3 % (adaptive)",
        "half of the images fall within 3.4/255",
        "masked: 1 of 2 checks shows masking",
    ]


def test_json_has_null_for_what_is_not_finite_and_plain_values_for_numpy(example):
    nothing = replace(share_of(1, 2), value=math.nan, high=math.inf)
    model = {"num_classes": np.int64(2), "mean": np.array([0.5, np.nan]), "path": Path("a/b")}
    text = json_text(example(adaptive=nothing, model=model))

    def fail(constant):
        raise AssertionError(constant)

    found = json.loads(text, parse_constant=fail)
    assert found["adaptive"]["value"] is None
    assert found["adaptive"]["high"] is None
    assert found["model"] == {"num_classes": 2, "mean": [0.5, None], "path": "a/b"}


def test_csv_is_the_table(folder):
    assert (folder / "per_image.csv").read_bytes() == b"id,label,loss\na.png,3,0.5\nb.png,8,\n"


def test_absent_parts_leave_no_old_picture(tmp_path, example):
    for name in FILES:
        (tmp_path / name).write_text("old")
    write_report(example(curves=(), gallery=()), {kind: [] for kind in KINDS}, PER_IMAGE, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "per_image.csv",
        "report.html",
        "report.json",
    ]


def test_the_difference_is_amplified_around_grey_by_one_factor():
    clean = np.full((2, 2, 3), 100, np.uint8)
    up, down = clean.copy(), clean.copy()
    up[0, 0, 0], down[1, 1, 2] = 108, 97
    pictures = {"clean": [clean], "oblivious": [up], "adaptive": [down]}
    assert difference_factor(pictures) == 15
    expected = np.full((2, 2, 3), 128, np.uint8)
    expected[1, 1, 2] = 128 - 45
    np.testing.assert_array_equal(difference(clean, down, 15), expected)
    assert difference_factor({kind: [clean] for kind in KINDS}) == 127
    opposite = {"clean": [clean * 0], "oblivious": [clean * 0 + 255], "adaptive": [clean * 0]}
    assert difference_factor(opposite) == 1
    assert difference(clean * 0, clean * 0 + 255, 1).max() == 255


def test_the_gallery_says_what_is_right(example, drawn):
    rows, _ = gallery_rows(example(), drawn())
    marks = [[tile.right for tile in row.tiles if tile.prediction] for row in rows]
    assert marks == [[True, True, False], [False, True, False]]


def test_terminal_shows_both_numbers_side_by_side(tmp_path, example):
    console = Console(record=True, width=100, file=(tmp_path / "terminal").open("w"))
    print_table(example(), console)
    lines = console.export_text().replace(SPACE, " ").splitlines()
    assert lines[0] == "Verdict: masked"
    (fgsm,) = [line for line in lines if "fgsm" in line]
    assert re.findall(r"[\d.]+ %", fgsm) == ["94.6 %", "14.8 %"]
    assert any("Robust accuracy (adaptive)" in line and "0.3 %" in line for line in lines)
    (half,) = [line for line in lines if line.startswith("Half of the images fall")]
    assert half.split() == [
        *["Half", "of", "the", "images", "fall", "within", "3.4/255", "3/255", "to", "unbounded"],
        *["half", "of", "1,000", "images"],
    ]
    assert any(line.startswith("sign of masking: Does a black box") for line in lines)
