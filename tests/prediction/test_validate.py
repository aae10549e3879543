"""validate.py: sound files pass with one line; each fault is named with its line and its fix."""

# ruff: noqa: E501 (tables of a fault a line)

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robust_submission.prediction.faults import SHOWN, Faults, line_ranges
from robust_submission.prediction.formats import Predictions, write_predictions
from submission import validate as command
from submission.validate import Options, validate

HEADER = "image_id,label\n"


def faults_of(path: Path, **options) -> list[str]:
    """The lines of the message after its first, [] for a sound file."""
    try:
        validate(Options(file=path, **options))
    except ValueError as error:
        first, *lines = str(error).split("\n")
        assert re.fullmatch(rf"{re.escape(str(path))}: \d+ rows?, \d+ faults?", first)
        return lines
    return []


def check(path: Path, content: str | bytes, **options) -> list[str]:
    """Faults in short: "line 2: expected X, found Y", without the fix, which must be there."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    lines = faults_of(path, **options)
    assert all(re.search(r"\. Fix: \w.*\.$", line) for line in lines)
    return [line.split(". Fix: ")[0] for line in lines]


@pytest.fixture
def sub(tmp_path: Path) -> Path:
    return tmp_path / "sub.csv"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.csv"
    path.write_text("id,class\nb.png,0\na.png,0\nc.png,0\n")
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("2.png", "10.png", "x/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name)
    return folder


# --- sound files


@pytest.mark.parametrize(
    "content",
    [
        HEADER + "a.png,0\nb.png,7\n",
        HEADER + "a.png,0\r\nb.png,7\r\n",
        HEADER + "a.png,0",
        HEADER + '"a,""b"".png",0\n"new\nline",1\n',
        "image_id,label,p_cat,p_dog\na,0,0.5,0.5\nb,1,0.5,0.5\nc,1,0.3,0.7\nd,0,1,0\ne,0,1e0,0E-3\n",
    ],
)
def test_sound_csv(sub: Path, content: str) -> None:
    assert check(sub, content) == []


def test_sound_json(tmp_path: Path) -> None:
    entries = [{"image_id": 3, "category_id": 0}, {"category_id": 1, "image_id": 1}]
    for indent in (None, 2):
        assert check(tmp_path / "a.json", json.dumps(entries, indent=indent)) == []


@pytest.mark.parametrize("format", ["csv", "json", "neurips"])
@pytest.mark.parametrize("with_shares", [False, True])
def test_what_predict_writes_is_valid(tmp_path, images, format, with_shares, capsys) -> None:
    path = tmp_path / ("sub.json" if format == "json" else "sub.csv")
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 3).astype(np.float32)
    predictions = Predictions(
        ids=["2.png", "10.png", "x/1.png"],
        labels=shares.argmax(1),
        class_names=["a", "b", "c d"],
        probabilities=shares if with_shares else None,
    )
    write_predictions(path, predictions, format=format)
    for options in ({}, {"images": images}, {"num_classes": 3}, {"class_names": ("a", "b", "c d")}):
        assert faults_of(path, format=format, **options) == []
        assert capsys.readouterr().out == f"{path}: 3 rows, valid\n"


@pytest.mark.parametrize("with_names", [False, True])
@pytest.mark.parametrize("share", ["0.5", "0"])
@pytest.mark.parametrize("header", ["id,y", "id,class,cat,dog", "id,cat,dog", "id,p_dog,p_cat"])
def test_what_follows_a_template_is_valid(tmp_path, header, share, with_names) -> None:
    template, path = tmp_path / "t.csv", tmp_path / "sub.csv"
    labelled = header.startswith(("id,y", "id,class"))
    shares = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32) if header != "id,y" else None
    filler = ["cat" if with_names else "0"] * labelled + [share] * (2 if shares is not None else 0)
    rows = "".join(",".join([name, *filler]) + "\n" for name in ("b", "a"))
    template.write_text(f"{header}\n{rows}")
    predictions = Predictions(
        ids=["a.png", "b.png"],
        labels=np.array([0, 1]),
        class_names=["cat", "dog"],
        probabilities=shares,
    )
    write_predictions(path, predictions, template=template)
    assert faults_of(path, template=template, class_names=("cat", "dog")) == []
    assert faults_of(path, template=template) == []


@pytest.mark.parametrize("columns", ["", "label,", "guess,"])
def test_a_template_of_numbered_columns_and_placeholders(sub, template, columns) -> None:
    template.write_text(f"id,{columns}0,1,2\na.png{',0' * (3 + bool(columns))}\n")
    label = ",1" if columns else ""
    content = f"id,{columns}0,1,2\na.png{label},0.1,0.7,0.2\n"
    assert check(sub, content, template=template) == []
    assert check(sub, content, template=template, num_classes=3) == []


# --- faults of a CSV, each with its line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # header
        ("", ["line 1: expected a row for each image, found no rows"]),
        (HEADER, ["line 1: expected a row for each image, found no rows"]),
        ("a.png,0\n", ["line 1: expected the header 'image_id,label', found a row, 'a.png,0'"]),
        ("id,y\na.png,0\n", ["line 1: expected the header 'image_id,label', found 'id,y'"]),
        ("image_id, label\na.png,0\n", ["line 1: expected the header 'image_id,label', found 'image_id, label'"]),
        ("image_id;label\na;0\n", ["line 1: expected the header 'image_id,label', found 'image_id;label'", "line 2: expected 2 cells, found 1: ['a;0']"]),
        # rows
        (HEADER + "a.png\nb.png,1,\nc.png,0\n", ["line 2: expected 2 cells, found 1: ['a.png']", "line 3: expected 2 cells, found 3: ['b.png', '1', '']"]),
        (HEADER + "a,0\nb,1\na,1\n", ["line 4: expected each id once, found 'a' on line 2 already"]),
        (HEADER + "\na,0\n  \n", ["line 2: expected a row, found a blank line", "line 4: expected a row, found a blank line"]),
        (HEADER + "a,0\n\n", ["line 3: expected a row, found a blank line"]),
        (HEADER + ",0\n", ["line 2: expected an id, found an empty cell"]),
        (HEADER + " a,0\nb ,0\n", ["line 2: expected 'a', found ' a'", "line 3: expected 'b', found 'b '"]),
        # labels
        (HEADER + "a,cat\n", ["line 2: expected an integer from 0 as the label, found 'cat'"]),
        (HEADER + "a,\n", ["line 2: expected an integer from 0 as the label, found ''"]),
        (HEADER + "a,1.0\n", ["line 2: expected an integer from 0 as the label, found '1.0'"]),
        (HEADER + "a,-1\n", ["line 2: expected an integer from 0 as the label, found '-1'"]),
        (HEADER + "a,1_0\n", ["line 2: expected an integer from 0 as the label, found '1_0'"]),
        (HEADER + "a,\u0663\n", ["line 2: expected an integer from 0 as the label, found '\u0663'"]),
        (HEADER + "a,03\n", ["line 2: expected 3 as the label, found '03'"]),
        (HEADER + "a,3 \n", ["line 2: expected 3 as the label, found '3 '"]),
        # bytes
        (b"\xef\xbb\xbf" + HEADER.encode() + b"a,0\n", ["line 1: expected no byte order mark, found one (ef bb bf)"]),
        (HEADER.encode() + b"a,0\n\xe9.png,0\n", ["line 3: expected UTF-8 text, found the byte 0xe9"]),
        (b"image_id,label\ra,0\rb,1\r", ["line 1: expected lines ended by LF or CRLF, found a lone CR"]),
        # quotes: the rest of the file is still read
        (HEADER + '"a,0\nb,1\nc,x\n', ["line 2: expected a closing quote before a comma, found '\"a,0'", "line 4: expected an integer from 0 as the label, found 'x'"]),
        (HEADER + 'a,0\n"b"c,1\nd,1\n"e,1\n', ["line 3: expected a closing quote before a comma, found '\"b\"c,1'", "line 5: expected a closing quote before a comma, found '\"e,1'"]),
        (HEADER + '"two\nlines",0\nb,x\n', ["line 4: expected an integer from 0 as the label, found 'x'"]),
    ],
)  # fmt: skip
def test_csv_faults(sub: Path, content: str | bytes, expected: list[str]) -> None:
    assert check(sub, content) == expected


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ("0,0.6,0.4", []),
        ("1,0.6,0.4", ["the most probable class, 0 ('cat'), found '1'"]),
        ("0,0.5,0.4", ["probabilities that sum to 1, found a sum of 0.900000"]),
        ("0,0.5995,0.4", []),
        ("0,0.5985,0.4", ["probabilities that sum to 1, found a sum of 0.998500"]),
        ("0,1.1,-0.1", ["probabilities from 0 to 1, found 1.1"]),
        ("0,nan,0.4", ["numbers from 0 to 1, found 'nan'"]),
        ("0,inf,0.4", ["numbers from 0 to 1, found 'inf'"]),
        ("0,0.6,", ["numbers from 0 to 1, found ''"]),
        ("0,0.6, 0.4", ["numbers from 0 to 1, found ' 0.4'"]),
        ("0,0.6,0_4", ["numbers from 0 to 1, found '0_4'"]),
        ('0,0.6,"0,4"', ["numbers from 0 to 1, found '0,4'"]),
        ("2,0.6,0.4", ["an integer from 0 to 1 as the label, found '2'"]),
        ("0,0.6", ["4 cells, found 3: ['b', '0', '0.6']"]),
    ],
)
def test_probabilities(sub: Path, cells: str, expected: list[str]) -> None:
    content = f"image_id,label,p_cat,p_dog\na,1,0.4,0.6\nb,{cells}\n"
    assert check(sub, content) == [f"line 3: expected {fault}" for fault in expected]


def test_columns_in_another_order_than_the_classes_are_followed(sub: Path) -> None:
    content = "image_id,label,p_dog,p_cat\na,0,0.4,0.6\nb,0,0.9,0.1\n"
    expected = "line 3: expected the most probable class, 1 ('dog'), found '0'"
    assert check(sub, content, class_names=("cat", "dog")) == [expected]


def test_a_header_with_other_classes(sub: Path) -> None:
    content = "image_id,label,p_cat,p_cow\na,0,1,0\n"
    expected = "the header 'image_id,label,p_cat,p_dog', found 'image_id,label,p_cat,p_cow'"
    assert check(sub, content, class_names=("cat", "dog")) == [f"line 1: expected {expected}"]


def test_labels_and_the_number_of_classes(sub: Path) -> None:
    content = HEADER + "a,0\nb,2\nc,3\nd,99999999999999999999999\n"
    expected = "expected an integer from 0 to 2 as the label, found"
    faults = [f"line 4: {expected} '3'", f"line 5: {expected} '99999999999999999999999'"]
    assert check(sub, content, num_classes=3) == faults
    assert check(sub, content) == []
    names = ("cat", "dog", "fish")
    assert check(sub, content, class_names=names) == faults


def test_labels_that_are_class_names(sub: Path) -> None:
    content = HEADER + "a,cat\nb,dog\nc,cow\nd,1\ne,dog \n"
    known = "expected one of 'cat, dog' as the label"
    assert check(sub, content, class_names=("cat", "dog")) == [
        f"line 4: {known}, found 'cow'",
        f"line 5: {known}, found '1'",
        "line 6: expected 'dog' as the label, found 'dog '",
    ]


def test_neurips(sub: Path) -> None:
    options = {"format": "neurips"}
    assert check(sub, "a,0\nb,x\n", **options) == [
        "line 2: expected an integer from 0 as the label, found 'x'"
    ]
    assert check(sub, HEADER + "a,0\n", **options) == [
        "line 1: expected no header, found 'image_id,label'"
    ]
    assert check(sub, "a,0,0.2,0.8\n", **options) == [
        "line 1: expected the most probable class, 1 ('1'), found '0'"
    ]
    assert check(sub, "a,0,2\nb,1\n", **options) == [
        "line 1: expected 2 cells, found 3: ['a', '0', '2']"
    ]
    assert check(sub, "a,0\nb,1,2\n", **options) == [
        "line 2: expected 2 cells, found 3: ['b', '1', '2']"
    ]


# --- against a template


def test_template_faults(sub: Path, template: Path) -> None:
    assert check(sub, "id,class\nb.png,1\na.png,2\nc.png,3\n", template=template) == []
    assert check(sub, HEADER + "b.png,0\nx.png,0\n a.png,0\n", template=template) == [
        "line 1: expected the header 'id,class', found 'image_id,label'",
        "line 3: expected an id of the template, found 'x.png'",
        "line 4: expected 'a.png', found ' a.png'",
        "the whole file: expected rows for 3 ids, found no row for 1: 'c.png'",
    ]


def test_order(sub: Path, template: Path) -> None:
    here = "here, the template's order, found"
    assert check(sub, "id,class\na.png,0\nb.png,0\nc.png,0\n", template=template) == [
        f"line 2: expected 'b.png' {here} 'a.png'",
        f"line 3: expected 'a.png' {here} 'b.png'",
    ]
    # a missing row shifts the others without being their fault
    assert check(sub, "id,class\na.png,0\nc.png,0\n", template=template) == [
        "the whole file: expected rows for 3 ids, found no row for 1: 'b.png'"
    ]


def test_template_decides_between_names_and_integers(sub: Path, template: Path) -> None:
    body = "id,class\nb.png,{}\na.png,{}\nc.png,{}\n"
    template.write_text(body.format("cat", "dog", "cat"))
    names = ("cat", "dog")
    assert check(sub, body.format("dog", "dog", "cat"), template=template) == []
    known = "expected one of 'cat, dog' as the label"
    found = check(sub, body.format(0, "dog", "x"), template=template, class_names=names)
    assert found == [f"line 2: {known}, found '0'", f"line 4: {known}, found 'x'"]
    template.write_text(body.format(0, 1, 1))
    found = check(sub, body.format("cat", 1, 0), template=template, class_names=names)
    assert found == ["line 2: expected an integer from 0 to 1 as the label, found 'cat'"]


def test_missing_ids_are_listed_and_shortened(sub: Path, template: Path) -> None:
    template.write_text("id,class\n" + "".join(f"{index}.png,0\n" for index in range(100)))
    [fault] = check(sub, "id,class\n7.png,0\n", template=template)
    assert fault.startswith("the whole file: expected rows for 100 ids, found no row for 99: '0.p")
    assert fault.endswith("'20.png', … and 79 more")


def test_a_faulty_template_is_named(sub: Path, template: Path) -> None:
    sub.write_text(HEADER + "a,0\n")
    template.write_text("id,class\na,0\na,0\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(template))}: line 3: expected each"):
        validate(Options(file=sub, template=template))


# --- against the images


def test_images(sub: Path, images: Path, template: Path) -> None:
    assert check(sub, HEADER + "x/1.png,0\n10.png,0\n2.png,0\n", images=images) == []
    assert check(sub, HEADER + "1.png,0\n10.png,0\n", images=images) == [
        "line 2: expected the name of an image, found '1.png'",
        "the whole file: expected rows for 3 ids, found no row for 2: '2.png', 'x/1.png'",
    ]
    template.write_text("id,class\n10,0\n2,0\nx/1,0\n")
    options = {"images": images, "template": template}
    assert check(sub, template.read_text(), **options) == []
    assert check(sub, "id,class\n10.png,0\n2,0\nx/1,0\n", **options) == [
        "line 2: expected an id of the template, found '10.png'",
        "the whole file: expected rows for 3 ids, found no row for 1: '10'",
    ]


def test_a_name_that_truly_has_spaces(sub: Path, images: Path) -> None:
    (images / "2.png").rename(images / " 2.png")
    assert check(sub, HEADER + "10.png,0\nx/1.png,0\n 2.png,0\n", images=images) == []


def test_json_images_and_template(tmp_path: Path, images: Path, template: Path) -> None:
    entries = [{"image_id": number, "category_id": 0} for number in (1, 2, 11)]
    path = tmp_path / "sub.json"
    assert check(path, json.dumps(entries), images=images) == [
        "line 1, entry 3: expected the name of an image, found 11",
        "the whole file: expected rows for 3 ids, found no row for 1: 10",
    ]
    template.write_text("id,class\n2.png,0\n1.png,0\n11.png,0\n")
    here = "here, the template's order, found"
    assert check(path, json.dumps(entries, indent=0), template=template) == [
        f"line 2, entry 1: expected 2 {here} 1",
        f"line 6, entry 2: expected 1 {here} 2",
    ]


# --- faults of a JSON


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ["line 1: expected a JSON array, found the end of the file"]),
        ("\n{}", ["line 2: expected a JSON array, found '{}'"]),
        ("[]", ["line 1: expected a row for each image, found no rows"]),
        ("\ufeff[{ID: 1, CAT: 0}]", ["line 1: expected no byte order mark, found one (ef bb bf)"]),
        ('[{ID: 1, CAT: 0},\n{ID: 2, "x": "\udcff", CAT: 0}]', ["line 2: expected UTF-8 text, found the byte 0xff", "line 2, entry 2: expected an object of image_id, category_id, found {'image_id': 2, 'x': '\\udcff', 'category_id': 0}"]),
        # truncated and broken
        ("[{ID: 1, CAT: 0},\n{ID: 2, CA", ["line 2, entry 2: expected valid JSON up to a closing ], found 'CA'"]),
        ("[{ID: 1, CAT: 0},\n{ID: 2, \"cat", ["line 2, entry 2: expected valid JSON up to a closing ], found the end of the file"]),
        ("[{ID: 1, CAT: 0},\n", ["line 1, entry 2: expected valid JSON up to a closing ], found the end of the file"]),
        ("[{ID: 1, CAT: 0}\n", ["line 1, entry 2: expected a comma or a closing ], found the end of the file"]),
        ("[{ID: 1, CAT: 0}\n{ID: 2, CAT: 0}]", ["line 2, entry 2: expected a comma or a closing ], found '{\"image_id\": 2, \"category_id\": 0}]'"]),
        ("[{ID: 1, CAT: 0},]", ["line 1, entry 2: expected valid JSON up to a closing ], found ']'"]),
        ("[{ID: 1, CAT: 0}] x", ["line 1, entry 2: expected nothing after the array, found 'x'"]),
        # keys and types
        ("[{ID: 1}]", ["line 1, entry 1: expected an object of image_id, category_id, found {'image_id': 1}"]),
        ("[{ID: 1, CAT: 0, \"x\": 0}]", ["line 1, entry 1: expected an object of image_id, category_id, found {'image_id': 1, 'category_id': 0, 'x': 0}"]),
        ("[{ID: 1, ID: 1, CAT: 0}]", ["line 1, entry 1: expected an object of image_id, category_id, found [('image_id', 1), ('image_id', 1), ('category_id', 0)]"]),
        ("[\n7,\nnull]", ["line 2, entry 1: expected an object of image_id, category_id, found 7", "line 3, entry 2: expected an object of image_id, category_id, found None"]),
        ("[{ID: true, CAT: 0}]", ["line 1, entry 1: expected an integer as image_id, found True"]),
        ("[{ID: \"1\", CAT: 0}]", ["line 1, entry 1: expected an integer as image_id, found '1'"]),
        ("[{ID: 1, CAT: 1.0}]", ["line 1, entry 1: expected an integer as category_id, found 1.0"]),
        ("[{ID: 1, CAT: false}]", ["line 1, entry 1: expected an integer as category_id, found False"]),
        ("[{ID: 1, CAT: null}]", ["line 1, entry 1: expected an integer as category_id, found None"]),
        # values
        ("[{ID: -1, CAT: 0}]", ["line 1, entry 1: expected an integer from 0, found a negative one"]),
        ("[{ID: 1, CAT: -1}]", ["line 1, entry 1: expected an integer from 0 as the label, found -1"]),
        ("[{ID: 1, CAT: 0},\n{ID: 2, CAT: 0}, {ID: 1, CAT: 1}]", ["line 2, entry 3: expected each id once, found 1 on entry 1 already"]),
        # probabilities
        ("[{ID: 1, CAT: 0, P: [0.2, 0.8]}]", ["line 1, entry 1: expected the most probable class, 1 ('1'), found 0"]),
        ("[{ID: 1, CAT: 0, P: [0.2, NaN]}]", ["line 1, entry 1: expected probabilities from 0 to 1, found nan"]),
        ("[{ID: 1, CAT: 0, P: [1" + "0" * 400 + ", 0.5]}]", ["line 1, entry 1: expected probabilities from 0 to 1, found 1" + "0" * 79 + "…"]),
        ("[{ID: 1, CAT: 0, P: [1, 0]}, {ID: 2, CAT: 0}]", ["line 1, entry 2: expected an object of image_id, category_id, probabilities, found {'image_id': 2, 'category_id': 0}"]),
        ("[{ID: 1, CAT: 0, P: [1, 0]}, {ID: 2, CAT: 0, P: [1]}]", ["line 1, entry 2: expected a list of 2 numbers, found [1]"]),
        ("[{ID: 1, CAT: 0, P: [1, \"0\"]}]", ["line 1, entry 1: expected a list of 2 numbers, found [1, '0']"]),
        ("[{ID: 1, CAT: 0, P: 1}]", ["line 1, entry 1: expected a list of numbers, found 1"]),
    ],
)  # fmt: skip
def test_json_faults(tmp_path: Path, content: str, expected: list[str]) -> None:
    words = {"ID": '"image_id"', "CAT": '"category_id"', "P": '"probabilities"'}
    content = re.sub(r"\b(ID|CAT|P)\b(?=:)", lambda word: words[word[0]], content)
    path = tmp_path / "sub.json"
    assert check(path, content.encode(errors="surrogateescape")) == expected


@pytest.mark.parametrize("entry", ["[" * 100_000, '{"image_id": ' + "1" * 5000 + "}"])
def test_json_that_breaks_its_parser(tmp_path: Path, entry: str) -> None:
    [fault] = check(tmp_path / "sub.json", f"[{entry}]")
    assert fault.startswith("line 1, entry 1: expected a plain entry, found ")


# --- many faults


def test_line_ranges() -> None:
    assert line_ranges([9, 3, 4, 5, 5]) == "3-5, 9"
    many = line_ranges(range(0, 100, 2))
    assert many == "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, …, 98"


def test_thousands_of_faults_stay_readable_and_exact(sub: Path) -> None:
    rows = [f"{index},{'x' if index % 2 else 0}\n" for index in range(5000)]
    sub.write_text(HEADER + "".join(rows) + ",\n")
    with pytest.raises(ValueError, match="5001 rows, 2502 faults") as raised:
        validate(Options(file=sub))
    _, *lines = str(raised.value).split("\n")
    assert [int(line.split()[1][:-1]) for line in lines[:SHOWN]] == list(range(3, 43, 2))
    assert lines[SHOWN:] == [
        "line 5002: expected an id, found an empty cell. Fix: write the image's file name.",
        "2481 more of the kind 'label', lines 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63, …, 5001-5002",
    ]


def test_few_faults_are_all_told(sub: Path) -> None:
    faults = check(sub, HEADER + "".join(f"{index},x\n" for index in range(SHOWN)))
    assert [fault.split(":")[0] for fault in faults] == [f"line {n}" for n in range(2, SHOWN + 2)]


def test_faults_count_as_false_when_there_are_none() -> None:
    assert not Faults()


# --- the command


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(command.__file__), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_command_accepts(sub: Path) -> None:
    sub.write_text(HEADER + "a,0\n")
    result = run(sub)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{sub}: 1 row, valid\n", "")


def test_command_refuses(sub: Path, images: Path) -> None:
    sub.write_text(HEADER + "10.png,0\n\n10.png,-1\n")
    result = run(sub, "--images", images)
    assert (result.returncode, result.stdout) == (1, "")
    first, *lines = result.stderr.splitlines()
    assert first == f"error: {sub}: 2 rows, 4 faults"
    starts = ["line 3: ", "line 4: ", "line 4: ", "the whole file: "]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "file"),
        (["--imges", "x", "sub.csv"], "unknown option --imges; nearest known: images"),
        (["sub.csv", "--format", "xml"], "xml"),
        (["sub.csv", "--num_classes", "many"], "many"),
        (["a.csv", "b.csv"], "b.csv"),
    ],
)
def test_command_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_command_on_files_that_are_none(tmp_path: Path) -> None:
    result = run(tmp_path / "no.csv")
    message = f"error: {tmp_path}/no.csv: expected a prediction file, found nothing there.\n"
    assert (result.returncode, result.stderr) == (1, message)
    with pytest.raises(ValueError, match="found a folder"):
        validate(Options(file=tmp_path))
    (tmp_path / "sub.txt").write_text("")
    with pytest.raises(ValueError, match=r"expected the ending \.csv or \.json, or --format"):
        validate(Options(file=tmp_path / "sub.txt"))


@pytest.mark.parametrize(("names", "count"), [(("a",), 2), ((), 0), ((), -1)])
def test_class_options_must_agree(names: tuple[str, ...], count: int) -> None:
    with pytest.raises(ValueError, match="--num_classes: expected"):
        Options(file=Path("sub.csv"), class_names=names, num_classes=count)
