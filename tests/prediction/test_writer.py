"""The prediction file as it is planned and written: exact bytes, round trips, templates."""

# ruff: noqa: E501 (tables of a case a line)

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_submission.prediction.layout import plan_layout, read_template
from robust_submission.prediction.schema import Format, choose_format
from robust_submission.prediction.writer import Predictions, write_predictions

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
) -> str:
    """The text of the file; its probabilities are asked for unless there is a template."""
    model = None
    if template is not None:
        (folder / "t.csv").write_bytes(template.encode(errors="surrogateescape"))
        model = read_template(folder / "t.csv", format)
    wanted = shares is not None and template is None
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


def test_class_names_that_are_integers_count_as_names_first(tmp_path: Path):
    template = 'id,y\n2.png,30\n10.png,10\n"a,b.png",10\n'
    content = written(tmp_path, template=template, names=["10", "20", "30"])
    assert content == 'id,y\n2.png,20\n10.png,10\n"a,b.png",30\n'


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
    with pytest.raises(ValueError, match=r"t\.csv: expected a readable file, found: No such file"):
        read_template(tmp_path / "t.csv", "csv")
    (tmp_path / "t.csv").write_text("id,y\n2.png,0\n")
    template = read_template(tmp_path / "t.csv", "csv")
    with pytest.raises(ValueError, match=r"t\.csv: expected probability columns, found none"):
        plan_layout("csv", ["2.png"], NAMES, template, probabilities=True)


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
