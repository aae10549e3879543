"""The prediction file as it is planned and written: exact bytes, round trips, templates."""

# ruff: noqa: E501 (tables of a case a line)

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_submission.prediction.layout import plan_layout
from robust_submission.prediction.schema import Answers, Format, choose_format
from robust_submission.prediction.template import read_template
from robust_submission.prediction.writer import Predictions, label_unread, write_predictions

NAMES = ["cat", "dog", "fish"]
IDS = ["2.png", "10.png", "a,b.png"]
SHARES = np.array([[0.25, 0.5, 0.25], [1, 0, 0], [1 / 3, 0, 2 / 3]], np.float32)


def written(
    folder: Path,
    format: Format = "csv",
    template: str | None = None,
    *,
    images: list[str] = IDS,
    labels: tuple[int, ...] = (1, 0, 2),
    names: list[str] = NAMES,
    shares: np.ndarray | None = None,
    skipped: tuple[str, ...] = (),
    left_out: tuple[str, ...] = (),
    answers: dict[str, Any] | None = None,
) -> str:
    """The text of the file; its probabilities are asked for unless there is a template."""
    model = None
    if template is not None:
        (folder / "t.csv").write_bytes(template.encode(errors="surrogateescape"))
        model = read_template(folder / "t.csv", format)
    probabilities = shares is not None and template is None
    wanted = Answers(**{"probabilities": probabilities} | (answers or {}))
    layout = plan_layout(format, images, names, model, wanted, left_out)
    kept = [place for place, name in enumerate(images) if name not in skipped]
    predictions = Predictions(
        images=[images[place] for place in kept],
        labels=np.array(labels)[kept],
        probabilities=None if shares is None else shares[kept],
    )
    write_predictions(folder / "sub", predictions, layout)
    assert {path.name for path in folder.iterdir()} <= {"sub", "t.csv"}
    return (folder / "sub").read_bytes().decode()


# --- exact bytes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 'image_id,label\n2.png,1\n10.png,0\n"a,b.png",2\n'),
        ({"format": "neurips"}, '2.png,1\n10.png,0\n"a,b.png",2\n'),
        ({"shares": SHARES}, 'image_id,label,p_cat,p_dog,p_fish\n2.png,1,0.250000,0.500000,0.250000\n10.png,0,1.000000,0.000000,0.000000\n"a,b.png",2,0.333333,0.000000,0.666667\n'),
        ({"format": "json", "images": ["x/2.png", "010.JPEG", "7"]}, '[\n{"image_id": 2, "category_id": 1},\n{"image_id": 10, "category_id": 0},\n{"image_id": 7, "category_id": 2}\n]\n'),
        ({"format": "json", "images": ["2.png"], "labels": (1,), "shares": SHARES[:1]}, '[\n{"image_id": 2, "category_id": 1, "probabilities": [0.250000, 0.500000, 0.250000]}\n]\n'),
        # cells are quoted where a reader needs it
        ({"images": ['say "a".png', "a\nb", "a\rb", " a", "a ", "é.png", "plain name.png"], "labels": (0,) * 7}, 'image_id,label\n"say ""a"".png",0\n"a\nb",0\n"a\rb",0\n" a",0\n"a ",0\né.png,0\nplain name.png,0\n'),
        # probabilities a hair outside are clipped, and none is "-0.000000"
        ({"images": ["a"], "labels": (0,), "shares": np.array([[1.000001, -1e-9, -0.0]])}, "image_id,label,p_cat,p_dog,p_fish\na,0,1.000000,0.000000,0.000000\n"),
        # an image without a prediction
        ({"skipped": ("10.png",)}, 'image_id,label\n2.png,1\n"a,b.png",2\n'),
    ],
)  # fmt: skip
def test_bytes(tmp_path: Path, options: dict, expected: str):
    assert written(tmp_path, **options) == expected


nasty = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
awkward = st.text(st.sampled_from(list("\"',;\n\r\t =é ab")), min_size=1, max_size=6)


@given(
    images=st.lists(awkward | nasty, min_size=1, max_size=8, unique=True),
    names=st.lists(awkward | nasty, min_size=3, max_size=3, unique=True),
    seed=st.integers(0, 99),
)
def test_csv_round_trip(tmp_path_factory, images: list[str], names: list[str], seed: int):
    """As Python's csv module reads it, with probabilities and with class names as labels."""
    folder, rng = tmp_path_factory.mktemp("round"), np.random.default_rng(seed)
    names = [f"x{name}" for name in names]
    shares = rng.dirichlet(np.ones(3), len(images))
    labels = tuple(rng.integers(0, 3, len(images)).tolist())
    written(folder, images=images, names=names, labels=labels, shares=shares)
    with (folder / "sub").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["image_id", "label", *(f"p_{name}" for name in names)]
    assert [(row[0], int(row[1])) for row in rows] == list(zip(images, labels, strict=True))
    read = [[float(cell) for cell in row[2:]] for row in rows]
    np.testing.assert_allclose(read, shares, atol=5.1e-7)
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "y"], *([name, names[0]] for name in images)])
    template = (folder / "t.csv").read_bytes().decode()
    written(folder, template=template, images=images, names=names, labels=labels)
    with (folder / "sub").open(newline="", encoding="utf-8") as file:
        assert [row[1] for row in csv.reader(file)][1:] == [names[label] for label in labels]


# --- templates


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # its header, its order; integers
        ('id,class\n"a,b.png",0\n2.png,0\n10.png,0\n', 'id,class\n"a,b.png",2\n2.png,1\n10.png,0\n'),
        # class names
        ('id,y\n2.png,cat\n10.png,fish\n"a,b.png",cat\n', 'id,y\n2.png,dog\n10.png,cat\n"a,b.png",fish\n'),
        # empty labels
        ('id,y\n2.png,\n10.png,\n"a,b.png",\n', 'id,y\n2.png,1\n10.png,0\n"a,b.png",2\n'),
        # names without their endings
        ('id,y\n"a,b",0\n2,0\n10,0\n', 'id,y\n"a,b",2\n2,1\n10,0\n'),
        # byte order mark, CRLF and a blank line are not carried on
        ('\ufeffid,y\r\n2.png,0\r\n10.png,0\r\n"a,b.png",0\r\n\r\n', 'id,y\n2.png,1\n10.png,0\n"a,b.png",2\n'),
        # a header that needs quotes
        ('"id, image",y\n2.png,0\n10.png,0\n"a,b.png",0\n', '"id, image",y\n2.png,1\n10.png,0\n"a,b.png",2\n'),
        # as other tools write it: UTF-16, semicolons or tabs, an index column, an empty last one
        *(('id,y\n2.png,0\n"a,b.png",0\n10.png,0\n'.replace(",0\n", f"{mark}0\n").replace("id,y", f"id{mark}y").encode(code).decode("utf-8", "surrogateescape"), 'id,y\n2.png,1\n"a,b.png",2\n10.png,0\n') for mark, code in ((";", "utf-8"), ("\t", "utf-8"), (",", "utf-16"), ("\t", "utf-16-le"))),
        (',id,y\n0,2.png,0\n1,10.png,0\n2,"a,b.png",0\n', 'id,y\n2.png,1\n10.png,0\n"a,b.png",2\n'),
        ('id,y,\n2.png,0,\n10.png,0,\n"a,b.png",0,\n', 'id,y\n2.png,1\n10.png,0\n"a,b.png",2\n'),
        ('id,y,Usage\n2.png,0,Public\n10.png,0,Private\n"a,b.png",0,Public\n', 'id,y\n2.png,1\n10.png,0\n"a,b.png",2\n'),
        # rows of images that get none
        ('id,y\n10.png,0\nbad.png,0\n2.png,0\n"a,b.png",0\n', 'id,y\n10.png,0\n2.png,1\n"a,b.png",2\n'),
        ('id,y\n10,0\nbad,0\n2,0\n"a,b",0\n', 'id,y\n10,0\n2,1\n"a,b",2\n'),
    ],
)  # fmt: skip
def test_template(tmp_path: Path, template: str, expected: str):
    assert written(tmp_path, template=template, left_out=("bad.png",)) == expected


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("id,label,p_cat,p_dog,p_fish", "{label},0.250000,0.500000,0.250000"),
        ("id,label,fish,cat,dog", "{label},0.250000,0.250000,0.500000"),
        ("id,cat,dog,fish", "0.250000,0.500000,0.250000"),
        ("id,p_dog,p_cat,p_fish", "0.500000,0.250000,0.250000"),
        ("id,y,2,1,0", "{label},0.250000,0.500000,0.250000"),
        ("id,p_0,p_1,p_2", "0.250000,0.500000,0.250000"),
    ],
)
@pytest.mark.parametrize(("wanted", "label"), [("cat", "dog"), ("0", "1")])
def test_template_with_probabilities(tmp_path, header: str, cells: str, wanted: str, label: str):
    filler = ",".join([wanted, *["0"] * (header.count(",") - 1)])
    template = f"{header}\n1.png,{filler}\n"
    content = written(tmp_path, "csv", template, images=["1.png"], labels=(1,), shares=SHARES[:1])
    assert content == f"{header}\n1.png,{cells.format(label=label)}\n"


OPEN = "which leaves both open; give --labels names or --labels indices."


@pytest.mark.parametrize(
    ("labels", "answers", "expected"),
    [
        ("311", {}, "213"),  # 3 is no index: names
        ("011", {}, "102"),  # 0 is no name: indices
        ("000", {}, f"found '0', {OPEN}"),  # a placeholder
        ("111", {}, f"found '1', {OPEN}"),
        ("122", {}, f"found '1, 2', {OPEN}"),
        (["", "", ""], {}, f"found 'none', {OPEN}"),
        *(("021", {"labels": each}, wanted) for each, wanted in (("names", "213"), ("indices", "102"))),
        ("031", {}, "line 3: expected labels all from 0 to 2 or all class names ('1, 2, 3'), found '3'."),
    ],
)  # fmt: skip
def test_class_names_from_1_to_n(tmp_path: Path, labels: str, answers: dict, expected: str):
    """A label as written may be a name or an index, one less."""
    template = 'id,y\n2.png,{}\n10.png,{}\n"a,b.png",{}\n'
    try:
        template_text, names = template.format(*labels), ["1", "2", "3"]
        content = written(tmp_path, template=template_text, names=names, answers=answers)
        assert content == template.format(*expected)
    except ValueError as error:
        assert str(error).endswith(expected)


def test_names_in_another_form_of_unicode_are_the_same_image(tmp_path: Path):
    images = ["cafe\u0301.png", "b.png"]
    content = written(
        tmp_path, template="id,y\nb.png,0\ncafé.png,0\n", images=images, labels=(1, 0)
    )
    assert content == "id,y\nb.png,0\ncafé.png,1\n"
    images.append("café.png")  # two files, one name to the eye
    template = "id,y\ncafé.png,0\nb.png,0\ncafe\u0301.png,0\n"
    content = written(tmp_path, template=template, images=images)
    assert content == "id,y\ncafé.png,2\nb.png,0\ncafe\u0301.png,1\n"


def test_labels_by_choice_without_a_template(tmp_path: Path):
    content = written(tmp_path, answers={"labels": "names"})
    assert content == 'image_id,label\n2.png,dog\n10.png,cat\n"a,b.png",fish\n'
    with pytest.raises(ValueError, match="--labels: expected indices for JSON"):
        plan_layout("json", ["2.png"], NAMES, answers=Answers(labels="names"))


FAKE = np.array([[0.25, 0.75], [1, 2e-8], [0.5, 0.5]], np.float32)


@pytest.mark.parametrize(
    ("template", "answers", "expected"),
    [
        (None, {}, "image_name,score\n2.png,0.750000000\n10.png,0.000000020\n3.png,0.500000000\n"),
        (None, {"score_class": "real"}, "image_name,score\n2.png,0.250000000\n10.png,1.000000000\n3.png,0.500000000\n"),
        (None, {"score_class": "0"}, "image_name,score\n2.png,0.250000000\n10.png,1.000000000\n3.png,0.500000000\n"),
        *((f"{header}\n3.png,{filler}\n2.png,{filler}\n10.png,{filler}\n", {}, f"{header}\n3.png,0.500000000\n2.png,0.750000000\n10.png,0.000000020\n") for header, filler in (("id,label", "0.5"), ("id,Score", "0"), ("id,probability", ""))),
        # a column called after a class
        *((f"id,{column}\n2.png,0.5\n10.png,0.5\n3.png,0.5\n", {}, f"id,{column}\n2.png,0.250000000\n10.png,1.000000000\n3.png,0.500000000\n") for column in ("real", "p_real", "Real", "p_0")),
    ],
)  # fmt: skip
def test_scores(tmp_path: Path, template: str | None, answers: dict, expected: str):
    images, names = ["2.png", "10.png", "3.png"], ["real", "fake"]
    format = "csv" if template else "score"
    inputs: dict[str, Any] = {"images": images, "names": names, "shares": FAKE}
    answers = {"probabilities": False} | answers
    assert written(tmp_path, format, template, answers=answers, **inputs) == expected


@pytest.mark.parametrize(
    ("names", "choice", "found"),
    [(NAMES, None, "none"), (NAMES, "cow", "cow"), (NAMES, "3", "3"), (["a", "b"], "c", "c")],
)
def test_the_class_of_a_score_is_named(names: list[str], choice: str | None, found: str):
    expected = f"--score_class: expected one of the classes ({', '.join(names)})"
    with pytest.raises(ValueError, match=re.escape(expected) + f".* found {found}"):
        plan_layout("score", ["2.png"], names, answers=Answers(score_class=choice))


@pytest.mark.parametrize(
    ("cell", "answers", "found"),
    [
        (
            "0.5",
            {"score_class": "fake"},
            "score of 'fake', the --score_class, found the column 'real', another class.",
        ),
        ("0", {}, "column of labels, or fractions (0.5) for a score, found the class 'real'; give"),
    ],
)
def test_a_column_of_another_class_is_refused(tmp_path: Path, cell: str, answers: dict, found: str):
    (tmp_path / "t.csv").write_text(f"id,real\n2.png,{cell}\n")
    template = read_template(tmp_path / "t.csv", "csv")
    with pytest.raises(ValueError, match=re.escape(f"t.csv: line 1: expected a {found}")):
        plan_layout("csv", ["2.png"], ["real", "fake"], template, Answers(**answers))


@pytest.mark.parametrize(
    ("format", "answers", "message"),
    [
        ("score", {"probabilities": True}, "neither --probabilities nor --labels"),
        ("score", {"labels": "names"}, "neither --probabilities nor --labels"),
        ("csv", {"score_class": "dog"}, "--score_class: expected --format score"),
    ],
)
def test_what_does_not_go_together(format: Format, answers: dict, message: str):
    with pytest.raises(ValueError, match=message):
        plan_layout(format, ["2.png"], ["cat", "dog"], answers=Answers(**answers))


@pytest.mark.parametrize(("choice", "label"), [("dog", 1), ("2", 2), ("frequent", 0)])
def test_images_that_could_not_be_read_get_a_label(choice: str, label: int):
    predictions = Predictions(
        images=["a", "b", "c"], labels=np.array([0, 0, 2]), probabilities=SHARES
    )
    filled = label_unread(predictions, ["x", "y"], choice, NAMES)
    assert filled.images == ["a", "b", "c", "x", "y"]
    assert filled.labels.tolist() == [0, 0, 2, label, label]
    assert filled.probabilities is not None and filled.probabilities.dtype == np.float32
    np.testing.assert_allclose(filled.probabilities[3:], 1 / 3)
    sure = label_unread(predictions, ["x"], choice, NAMES, certain=True).probabilities
    assert sure is not None
    expected = [1 / 3] * 3 if choice == "frequent" else [float(label == each) for each in range(3)]
    np.testing.assert_allclose(sure[3], expected)
    with pytest.raises(ValueError, match=r"--bad_label: expected one of the classes .* found cow"):
        label_unread(predictions, ["x"], "cow", NAMES)


def test_template_of_json_and_neurips_gives_the_order(tmp_path: Path):
    images = ["1.png", "2.png", "3.png"]
    for header, cells in (("id,y", "0"), ("id,cat,dog,fish", "0,0,0")):
        template = f"{header}\n3.png,{cells}\n1.png,{cells}\n2.png,{cells}\n"
        entries = json.loads(written(tmp_path, "json", template, images=images))
        assert [entry["image_id"] for entry in entries] == [3, 1, 2]
    template = "3.png,cat\n1.png,cat\n2.png,dog\n"
    content = written(tmp_path, "neurips", template, images=images)
    assert content == "3.png,fish\n1.png,dog\n2.png,cat\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ('id,y\n2.png,0\nx.png,0\n10.png,0\n"a,b.png",0\n', "line 3: expected the name of one of the 3 images, found the unknown id 'x.png'."),
        ("id,y\n2.png,0\n10.png,0\n", "line 3, the last: expected a row for each image, found none for 'a,b.png'."),
        ("id,y\n2.png,0\n", "line 2, the last: expected a row for each image, found none for '10.png' and 1 more."),
        ('id,y\n2.png,0\n10.png,0\n2.png,0\n"a,b.png",0\n', "line 4: expected each id once, found '2.png' on line 2 too."),
        ('2.png,0\n10.png,0\n"a,b.png",0\n', "line 1: expected a header, found the row of '2.png'."),
        ('id,y\n2.png,0\n10.png,bird\n"a,b.png",0\n', "line 3: expected labels all integers or all class names ('cat, dog, fish'), found 'bird'."),
        ('id,y\n2.png,0\n10.png,cat\n"a,b.png",0\n', "found a name among integers."),
        ('id,y,z\n2.png,0,0\n10.png,0,0\n"a,b.png",0,0\n', "line 1: expected an id, a label and one column per class ('cat, dog, fish'), found 'id, y, z'."),
        ("id,y\n2.png,0\n10.png\n", "line 3: expected 2 cells, found 1"),
        ("id,y\n,0\n", "line 2: expected 2 cells, found 2, the id ''"),
        ("id\n2.png\n", "expected a header and rows of an id and a label, found none."),
        ("id,y\n", "expected a header and rows of an id and a label, found none."),
        ("", "expected a header and rows of an id and a label, found none."),
        ('id,y\n"2.png,0\n', "line 2: expected a closing quote"),
        ("id,y\n2.png,0\udcff\n", "line 2: expected UTF-8 text, found the byte 0xff"),
    ],
)  # fmt: skip
def test_faulty_templates(tmp_path: Path, template: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        written(tmp_path, template=template)
    assert str(raised.value).startswith(f"{tmp_path}/t.csv: ")


def test_templates_that_are_no_csv_files_or_have_no_probabilities(tmp_path: Path):
    with pytest.raises(ValueError, match=r"t\.json: expected a CSV file as the template"):
        read_template(tmp_path / "t.json", "csv")
    with pytest.raises(ValueError, match=r"t\.csv: expected a file, found nothing there"):
        read_template(tmp_path / "t.csv", "csv")
    (tmp_path / "t.csv").write_text("id,y\n2.png,0\n")
    template = read_template(tmp_path / "t.csv", "csv")
    with pytest.raises(ValueError, match=r"t\.csv: expected probability columns, found none"):
        plan_layout("csv", ["2.png"], NAMES, template, Answers(probabilities=True))


# --- the profile, and what it cannot hold


@pytest.mark.parametrize(
    ("name", "format", "choice"),
    [
        ("a.csv", None, "csv"),
        ("a.JSON", None, "json"),
        ("a.txt", "neurips", "neurips"),
        ("a.csv", "json", "json"),
        ("a.txt", None, "a.txt: expected the ending .csv or .json, or --format, found .txt."),
        ("sub", None, "sub: expected the ending .csv or .json, or --format, found no ending."),
    ],
)
def test_choose_format(name: str, format: Format | None, choice: str):
    try:
        assert choose_format(Path(name), format) == choice
    except ValueError as error:
        assert str(error) == choice


@pytest.mark.parametrize(
    ("format", "images", "message"),
    [
        ("csv", ["a", "\udcff.png"], "'\\udcff.png': expected a file name in UTF-8; rename it."),
        *(("json", [name], f"{name!r}: expected an integer file name") for name in ("a.png", "1a.png", "-1.png", "1.2.png", "1/a.png", "²", ".png")),
        *(("json", [*pair], f"'{pair[1]}': expected one image 1, found also '{pair[0]}'.") for pair in (("1.png", "01.png"), ("1.png", "1.jpg"), ("a/1.png", "b/1.png"))),
    ],
)  # fmt: skip
def test_names_that_a_profile_cannot_hold(format: Format, images: list[str], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_layout(format, images, NAMES)


def test_a_folder_that_does_not_exist(tmp_path: Path):
    with pytest.raises(ValueError, match="expected the existing folder"):
        written(tmp_path / "no")
