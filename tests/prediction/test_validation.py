"""Sound prediction files pass; each fault of the others is named with its line and its fix."""

# ruff: noqa: E501 (tables of a fault a line)

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robust_submission.prediction.layout import expect, plan_layout
from robust_submission.prediction.schema import Answers, Format
from robust_submission.prediction.template import read_template
from robust_submission.prediction.validation import SHOWN, validate_file
from robust_submission.prediction.writer import Predictions, write_predictions

HEADER = "image_id,label\n"
IMAGES = ["2.png", "10.png", "x/1.png"]


def check(
    folder: Path,
    content: str | bytes,
    format: Format = "csv",
    template: str | None = None,
    **options,
) -> list[str]:
    """Faults in short: "line 2: expected X, found Y", without the fix, which must be there."""
    path = folder / "sub"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if template is not None:
        (folder / "template.csv").write_text(template)
        options["template"] = read_template(folder / "template.csv", format)
    try:
        assert re.fullmatch(r"\d+ rows?", validate_file(path, expect(format, **options)))
    except ValueError as error:
        first, *lines = str(error).split("\n")
        assert re.fullmatch(rf"{re.escape(str(path))}: \d+ rows?, \d+ faults?", first)
        assert all(re.search(r"\. Fix: \w.*\.$", line) for line in lines)
        return [line.split(". Fix: ")[0] for line in lines]
    return []


# --- sound files


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (HEADER + "a.png,0\nb.png,7\n", {}),
        (HEADER + "a.png,0\r\nb.png,7\r\n", {}),
        (HEADER + "a.png,0", {}),
        (HEADER + '"a,""b"".png",0\n"new\nline",1\n', {}),
        (HEADER + "10.png,0\n 2.png,0\n", {"images": [" 2.png", "10.png"]}),
        ("image_id,label,p_cat,p_dog\na,0,0.5,0.5\nb,1,0.5,0.5\nc,1,0.3,0.7\nd,0,1,0\ne,0,1e0,0E-3\n", {}),
        ("image_id,label,p_cat,p_dog\na,cat,0.6,0.4\n", {"num_classes": 2}),
        ('[{"image_id": 3, "category_id": 0}, {"category_id": 1, "image_id": 1}]', {"format": "json"}),
        ('[\n{"image_id": 3,\n"category_id": 0}\n]\n', {"format": "json"}),
        # a template of numbered columns, which holds placeholders
        *((f"id,{name}0,1,2\na{',1' if name else ''},0.1,0.7,0.2\n", {"template": f"id,{name}0,1,2\na{',0' * (3 + bool(name))}\n"} | count) for name in ("", "label,", "guess,") for count in ({}, {"num_classes": 3})),
    ],
)  # fmt: skip
def test_sound_files(tmp_path: Path, content: str, options: dict):
    assert check(tmp_path, content, **options) == []


@pytest.mark.parametrize("format", ["csv", "json", "neurips"])
@pytest.mark.parametrize("with_shares", [False, True])
def test_what_is_written_is_valid(tmp_path: Path, format: Format, with_shares: bool):
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 3).astype(np.float32)
    predictions = Predictions(images=IMAGES, labels=shares.argmax(1), probabilities=shares)
    answers = Answers(probabilities=with_shares)
    layout = plan_layout(format, IMAGES, ["a", "b", "c d"], answers=answers)
    write_predictions(tmp_path / "sub", predictions, layout)
    known: list[dict[str, Any]] = [
        {},
        {"images": IMAGES},
        {"num_classes": 3},
        {"class_names": ["a", "b", "c d"]},
    ]
    for options in known:
        assert validate_file(tmp_path / "sub", expect(format, **options)) == "3 rows"


@pytest.mark.parametrize("label", ["cat", "0"])
@pytest.mark.parametrize("share", ["0.5", "0"])
@pytest.mark.parametrize("header", ["id,y", "id,class,cat,dog", "id,cat,dog", "id,p_dog,p_cat"])
def test_what_follows_a_template_is_valid(tmp_path: Path, header: str, share: str, label: str):
    cells = [label] * header.startswith(("id,y", "id,class")) + [share] * 2 * (header != "id,y")
    rows = "".join(",".join([name, *cells]) + "\n" for name in ("b", "a"))
    (tmp_path / "t.csv").write_text(f"{header}\n{rows}")
    template = read_template(tmp_path / "t.csv", "csv")
    shares = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    images = ["a.png", "b.png"]
    predictions = Predictions(images=images, labels=np.array([0, 1]), probabilities=shares)
    layout = plan_layout("csv", images, ["cat", "dog"], template)
    write_predictions(tmp_path / "sub", predictions, layout)
    for names in (("cat", "dog"), ()):
        expected = expect("csv", template=template, class_names=names)
        assert validate_file(tmp_path / "sub", expected) == "2 rows"


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
        # what other tools write: one fault, and the rows are read
        ("image_id;label\na;0\nb;x\n", ["line 1: expected cells separated by commas, found semicolons", "line 3: expected an integer from 0 as the label, found 'x'"]),
        ("image_id\tlabel\na\t0\n", ["line 1: expected cells separated by commas, found tabs"]),
        *((mark + (HEADER + "é,0\r\n").encode(encoding), ["line 1: expected UTF-8 text, found UTF-16"]) for mark, encoding in ((b"", "utf-16"), (b"", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))),
        (",image_id,label\n0,a,0\n1,b,x\n", ["line 1: expected no index column, found ''", "line 3: expected an integer from 0 as the label, found 'x'"]),
        ("Unnamed: 0,image_id,label,p_a,p_b\n0,a,0,1,0\n", ["line 1: expected no index column, found 'Unnamed: 0'"]),
        ("image_id,label,\na,0,\n", ["line 1: expected no empty last column, found ''"]),
        ("image_id,label,Usage\na,0,Public\n", ["line 1: expected no extra column, found 'Usage'"]),
        ("image_id,Usage,label,p_a,p_b\na,Public,0,1,0\n", ["line 1: expected no extra column, found 'Usage'"]),
        (",image_id,label\n0,a,1\n1\n", ["line 1: expected no index column, found ''", "line 3: expected 2 cells, found 0: []"]),
        (",label\na,0\n", ["line 1: expected the header 'image_id,label', found ',label'"]),
        ("image_id,Label\na,0\n", ["line 1: expected the header 'image_id,label', found 'image_id,Label'"]),
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
        (HEADER + "a,03\n", ["line 2: expected an integer from 0 as the label, found '03'"]),
        (HEADER + "a,3 \n", ["line 2: expected an integer from 0 as the label, found '3 '"]),
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
def test_csv_faults(tmp_path: Path, content: str | bytes, expected: list[str]):
    assert check(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ("0,0.6,0.4", []),
        ("1,0.6,0.4", ["the most probable class, 0 ('cat'), found '1'"]),
        ("0,0.5,0.4", ["probabilities that sum to 1, found a sum of 0.900000"]),
        ("0,0.5995,0.4", []),
        ("0,0.5985,0.4", ["probabilities that sum to 1, found a sum of 0.998500"]),
        ("0,1.1,-0.1", ["probabilities from 0 to 1, found '1.1'"]),
        ("0,nan,0.4", ["probabilities from 0 to 1, found 'nan'"]),
        ("0,inf,0.4", ["probabilities from 0 to 1, found 'inf'"]),
        ("0,0.6,", ["probabilities from 0 to 1, found ''"]),
        ("0,0.6, 0.4", ["probabilities from 0 to 1, found ' 0.4'"]),
        ("0,0.6,0_4", ["probabilities from 0 to 1, found '0_4'"]),
        ('0,0.6,"0,4"', ["probabilities from 0 to 1, found '0,4'"]),
        ("2,0.6,0.4", ["an integer from 0 to 1 as the label, found '2'"]),
        ("0,0.6", ["4 cells, found 3: ['b', '0', '0.6']"]),
    ],
)
def test_probabilities(tmp_path: Path, cells: str, expected: list[str]):
    content = f"image_id,label,p_cat,p_dog\na,1,0.4,0.6\nb,{cells}\n"
    assert check(tmp_path, content) == [f"line 3: expected {fault}" for fault in expected]


@pytest.mark.parametrize(("share", "valid"), [("0.000313", True), ("0.000314", False)])
def test_thousands_of_classes_round_by_more(tmp_path: Path, share: str, valid: bool):
    """1 / 3200 = 0.0003125 is written as 0.000313."""
    header = ",".join(["image_id,label", *(f"p_{label}" for label in range(3200))])
    assert valid == (not check(tmp_path, f"{header}\na,0{f',{share}' * 3200}\n"))


SHARED = "image_id,label,p_{},p_{}\na,0,{},{}\n"
LABELS = HEADER + "a,0\nb,2\nc,3\nd,99999999999999999999999\n"
RANGE = "expected an integer from 0 to 2 as the label, found"
TEMPLATE = "id,class\nb.png,0\na.png,0\nc.png,0\n"
NAMED = "id,class\nb.png,cat\na.png,dog\nc.png,cat\n"
HERE = "here, the template's order, found"
OF_2 = "expected one of 'cat, dog' as the label, found"


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        # classes
        (SHARED.format("dog", "cat", 0.9, 0.1), {"class_names": ["cat", "dog"]}, ["line 2: expected the most probable class, 1 ('dog'), found '0'"]),
        (SHARED.format("cat", "cow", 1, 0), {"class_names": ["cat", "dog"]}, ["line 1: expected the header 'image_id,label,p_cat,p_dog', found 'image_id,label,p_cat,p_cow'"]),
        (SHARED.format("cat", "cat", 0.5, 0.5), {}, ["line 1: expected the header 'image_id,label,p_cat,p_cat', found 'image_id,label,p_cat,p_cat'"]),
        (LABELS, {}, []),
        (LABELS, {"num_classes": 3}, [f"line 4: {RANGE} '3'", f"line 5: {RANGE} '99999999999999999999999'"]),
        (LABELS, {"class_names": ["cat", "dog", "fish"]}, [f"line 4: {RANGE} '3'", f"line 5: {RANGE} '99999999999999999999999'"]),
        (HEADER + "a,cat\nb,dog\nc,cow\nd,1\ne,dog \n", {"class_names": ["cat", "dog"]}, [f"line 4: {OF_2} 'cow'", f"line 5: {OF_2} '1'", f"line 6: {OF_2} 'dog '"]),
        # neurips
        ("a,0\nb,x\n", {"format": "neurips"}, ["line 2: expected an integer from 0 as the label, found 'x'"]),
        (HEADER + "a,0\n", {"format": "neurips"}, ["line 1: expected no header, found 'image_id,label'"]),
        ("a,0,0.2,0.8\n", {"format": "neurips"}, ["line 1: expected the most probable class, 1 ('1'), found '0'"]),
        ("a,0,2\nb,1\n", {"format": "neurips"}, ["line 1: expected 2 cells, found 3: ['a', '0', '2']"]),
        ("a,0\nb,1,2\n", {"format": "neurips"}, ["line 2: expected 2 cells, found 3: ['b', '1', '2']"]),
        # against a template
        ("id,class\nb.png,1\na.png,2\nc.png,3\n", {"template": TEMPLATE}, []),
        (HEADER + "b.png,0\nx.png,0\n a.png,0\n", {"template": TEMPLATE}, ["line 1: expected the header 'id,class', found 'image_id,label'", "line 3: expected an id of the template, found 'x.png'", "line 4: expected 'a.png', found ' a.png'", "the whole file: expected rows for 3 ids, found no row for 1: 'c.png'"]),
        ("id,class\na.png,0\nb.png,0\nc.png,0\n", {"template": TEMPLATE}, [f"line 2: expected 'b.png' {HERE} 'a.png'", f"line 3: expected 'a.png' {HERE} 'b.png'"]),
        # a missing row shifts the others without being their fault
        ("id,class\na.png,0\nc.png,0\n", {"template": TEMPLATE}, ["the whole file: expected rows for 3 ids, found no row for 1: 'b.png'"]),
        ("id,class\nb.png,cat\na.png,1\nc.png,0\n", {"template": TEMPLATE, "class_names": ["cat", "dog"]}, ["line 2: expected an integer from 0 to 1 as the label, found 'cat'"]),
        ("id,class\nb.png,dog\na.png,dog\nc.png,cat\n", {"template": NAMED}, []),
        ("id,class\nb.png,0\na.png,dog\nc.png,x\n", {"template": NAMED, "class_names": ["cat", "dog"]}, [f"line 2: {OF_2} '0'", f"line 4: {OF_2} 'x'"]),
        # names that only look the same
        (HEADER + "café,0\nb,0\n", {"images": ["cafe\u0301", "b"]}, ["line 2: expected 'cafe\\u0301', found 'caf\\xe9', which only looks the same (another Unicode form)"]),
        ("id,class\nb,0\ncafe\u0301,0\n", {"template": "id,class\ncafé,0\nb,0\n"}, ["line 2: expected 'café' here, the template's order, found 'b'", "line 3: expected 'caf\\xe9', found 'cafe\\u0301', which only looks the same (another Unicode form)", "line 3: expected 'b' here, the template's order, found 'café'"]),
        # class folders 1 to N
        *((f"id,y\na,{label}\n", {"template": "id,y\na,0\n", "class_names": ["1", "2"], "labels": labels}, faults) for labels, label, faults in (("names", 2, []), ("indices", 2, ["line 2: expected an integer from 0 to 1 as the label, found '2'"]))),
        *((f"{HEADER}a,2\n", {"class_names": ["1", "2"], "labels": labels} | images, faults) for images in ({}, {"images": ["a"]}) for labels, faults in (("names", []), ("indices", ["line 2: expected an integer from 0 to 1 as the label, found '2'"]))),
        # names that are not known
        *((f"{HEADER}a,cat\nb,dog\nc, \n", {"labels": "names"} | known, ["line 4: expected a class name as the label, found ' '"]) for known in ({}, {"template": f"{HEADER}a,0\nb,0\nc,0\n"}, {"num_classes": 2})),
        # scores
        *((f"{header}\na,0.25\nb,1e-7\nc,1\n", {"format": "score"} | options, []) for header, options in (("image_name,score", {}), ("image_name,score", {"images": ["a", "b", "c"]}), ("id,prob", {"template": "id,prob\na,0\nb,0\nc,0\n"}))),
        ("id,label\na,0.25\n", {"template": "id,label\na,0.5\n"}, []),
        ("image_name,score\na,1.5\nb,x\nb,1\n", {"format": "score"}, ["line 2: expected probabilities from 0 to 1, found '1.5'", "line 3: expected probabilities from 0 to 1, found 'x'", "line 4: expected each id once, found 'b' on line 3 already"]),
        (HEADER + "a,1\n", {"format": "score"}, ["line 1: expected the header 'image_name,score', found 'image_id,label'"]),
        ("image_name,score\na,0.5\n", {}, ["line 1: expected the header 'image_id,label', found 'image_name,score'", "line 2: expected an integer from 0 as the label, found '0.5'"]),
        # against the images
        (HEADER + "x/1.png,0\n10.png,0\n2.png,0\n", {"images": IMAGES}, []),
        (HEADER + "1.png,0\n10.png,0\n", {"images": IMAGES}, ["line 2: expected the name of an image, found '1.png'", "the whole file: expected rows for 3 ids, found no row for 2: '2.png', 'x/1.png'"]),
        ("id,class\n10.png,0\n2,0\nx/1,0\n", {"images": IMAGES, "template": "id,class\n10,0\n2,0\nx/1,0\n"}, ["line 2: expected an id of the template, found '10.png'", "the whole file: expected rows for 3 ids, found no row for 1: '10'"]),
        # a JSON against images and a template
        ('[{"image_id": 1, "category_id": 0},\n{"image_id": 2, "category_id": 0}, {"image_id": 11, "category_id": 0}]', {"format": "json", "images": IMAGES}, ["line 2, entry 3: expected the name of an image, found 11", "the whole file: expected rows for 3 ids, found no row for 1: 10"]),
        ('[{"image_id": 1, "category_id": 0},\n{"image_id": 2, "category_id": 0}]', {"format": "json", "template": "id,class\n2.png,0\n1.png,0\n"}, [f"line 1, entry 1: expected 2 {HERE} 1", f"line 2, entry 2: expected 1 {HERE} 2"]),
    ],
)  # fmt: skip
def test_faults_against_what_is_known(tmp_path: Path, content: str, options: dict, expected):
    assert check(tmp_path, content, **options) == expected


def test_a_template_with_another_number_of_classes(tmp_path: Path):
    (tmp_path / "t.csv").write_text("id,cat,dog\na,0.5,0.5\n")
    with pytest.raises(ValueError, match="line 1: expected 3 classes, found columns for 2"):
        expect("csv", template=read_template(tmp_path / "t.csv", "csv"), num_classes=3)


# --- faults of a JSON


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ["line 1, entry 1: expected one array in valid JSON, up to its ], found the end of the file"]),
        ("\n{}", ["line 2, entry 1: expected one array in valid JSON, up to its ], found '{}'"]),
        ("[]", ["line 1: expected a row for each image, found no rows"]),
        ("\ufeff[{ID: 1, CAT: 0}]", ["line 1: expected no byte order mark, found one (ef bb bf)"]),
        ('[{ID: 1, CAT: 0},\n{ID: 2, "x": "\udcff", CAT: 0}]', ["line 2: expected UTF-8 text, found the byte 0xff", "line 2, entry 2: expected an object of image_id, category_id, found {'image_id': 2, 'x': '\\udcff', 'category_id': 0}"]),
        # truncated and broken
        ("[{ID: 1, CAT: 0},\n{ID: 2, CA", ["line 2, entry 2: expected one array in valid JSON, up to its ], found 'CA'"]),
        ("[{ID: 1, CAT: 0},\n{ID: 2, \"cat", ["line 2, entry 2: expected one array in valid JSON, up to its ], found '\"cat'"]),
        ("[{ID: 1, CAT: 0},\n", ["line 1, entry 2: expected one array in valid JSON, up to its ], found the end of the file"]),
        ("[{ID: 1, CAT: 0}\n", ["line 1, entry 2: expected one array in valid JSON, up to its ], found the end of the file"]),
        ("[{ID: 1, CAT: 0}\n{ID: 2, CAT: 0}]", ["line 2, entry 2: expected one array in valid JSON, up to its ], found '{\"image_id\": 2, \"category_id\": 0}]'"]),
        ("[{ID: 1, CAT: 0},]", ["line 1, entry 2: expected one array in valid JSON, up to its ], found ']'"]),
        ("[{ID: 1, CAT: 0}] x", ["line 1, entry 2: expected one array in valid JSON, up to its ], found 'x'"]),
        # keys and types
        ("[{ID: 1}]", ["line 1, entry 1: expected an object of image_id, category_id, found {'image_id': 1}"]),
        ("[{ID: 1, CAT: 0, \"x\": 0}]", ["line 1, entry 1: expected an object of image_id, category_id, found {'image_id': 1, 'category_id': 0, 'x': 0}"]),
        ("[{ID: 1, ID: 1, CAT: 0}]", ["line 1, entry 1: expected an object of image_id, category_id, found [('image_id', 1), ('image_id', 1), ('category_id', 0)]"]),
        ("[\n7,\nnull]", ["line 2, entry 1: expected an object of image_id, category_id, found 7", "line 3, entry 2: expected an object of image_id, category_id, found None"]),
        ("[{ID: true, CAT: 0}]", ["line 1, entry 1: expected an integer from 0 as image_id, found True"]),
        ("[{ID: \"1\", CAT: 0}]", ["line 1, entry 1: expected an integer from 0 as image_id, found '1'"]),
        ("[{ID: 1, CAT: 1.0}]", ["line 1, entry 1: expected an integer from 0 as category_id, found 1.0"]),
        ("[{ID: 1, CAT: false}]", ["line 1, entry 1: expected an integer from 0 as category_id, found False"]),
        ("[{ID: 1, CAT: null}]", ["line 1, entry 1: expected an integer from 0 as category_id, found None"]),
        # values
        *(("[" + entry + "]", ["line 1, entry 1: expected one array in valid JSON, up to its ], found '" + entry[:39] + "…"]) for entry in ("[" * 100_000, '{"x": ' + "1" * 5000 + "}")),
        ("[{ID: -1, CAT: 0}]", ["line 1, entry 1: expected an integer from 0 as image_id, found -1"]),
        ("[{ID: 1, CAT: -1}]", ["line 1, entry 1: expected an integer from 0 as category_id, found -1"]),
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
def test_json_faults(tmp_path: Path, content: str, expected: list[str]):
    words = {"ID": '"image_id"', "CAT": '"category_id"', "P": '"probabilities"'}
    content = re.sub(r"\b(ID|CAT|P)\b(?=:)", lambda word: words[word[0]], content)
    assert check(tmp_path, content.encode(errors="surrogateescape"), "json") == expected


# --- many faults


def test_thousands_of_faults_stay_readable(tmp_path: Path):
    rows = [f"{index},{'x' if index % 2 else 0}\n" for index in range(5000)]
    (tmp_path / "sub").write_text(HEADER + "".join(rows) + ",\n")
    with pytest.raises(ValueError, match="5001 rows, 2502 faults") as raised:
        validate_file(tmp_path / "sub", expect("csv"))
    _, *lines = str(raised.value).split("\n")
    assert [int(line.split()[1][:-1]) for line in lines[:SHOWN]] == list(range(3, 43, 2))
    further = ", ".join(map(str, range(43, 43 + 2 * SHOWN, 2)))
    assert lines[SHOWN:] == [
        "line 5002: expected an id, found an empty cell. Fix: write the image's file name.",
        f"2481 more of the kind 'label', lines {further}, …",
    ]


def test_missing_ids_are_listed_and_shortened(tmp_path: Path):
    [fault] = check(tmp_path, HEADER + "7.png,0\n", images=[f"{index}.png" for index in range(100)])
    assert fault.startswith("the whole file: expected rows for 100 ids, found no row for 99: '0.p")
    assert fault.endswith("'20.png', … and 79 more")
