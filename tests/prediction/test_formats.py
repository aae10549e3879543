"""The prediction file: exact bytes, round trips, templates, and what is refused."""

# ruff: noqa: E501 (tables of a case a line)

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_submission.prediction.formats import Predictions, choose_format, write_predictions
from robust_submission.prediction.layout import integer_ids, plan_layout, read_template

NAMES = ["cat", "dog", "fish"]
IDS = ["2.png", "10.png", "a,b.png"]


def predictions(ids=IDS, labels=(1, 0, 2), class_names=NAMES, probabilities=None) -> Predictions:
    return Predictions(
        ids=ids,
        labels=np.array(labels),
        class_names=class_names,
        probabilities=None if probabilities is None else np.array(probabilities, np.float32),
    )


SHARES = [[0.25, 0.5, 0.25], [1, 0, 0], [1 / 3, 0, 2 / 3]]


def written(path: Path, said: Predictions, **options) -> bytes:
    write_predictions(path, said, **options)
    assert list(path.parent.glob(".*")) == []
    return path.read_bytes()


def template(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sample_submission.csv"
    path.write_bytes(text.encode())
    return path


# --- exact bytes


def test_csv_bytes(tmp_path: Path) -> None:
    expected = b'image_id,label\n2.png,1\n10.png,0\n"a,b.png",2\n'
    assert written(tmp_path / "sub.csv", predictions()) == expected


def test_csv_bytes_with_probabilities(tmp_path: Path) -> None:
    expected = (
        b"image_id,label,p_cat,p_dog,p_fish\n"
        b"2.png,1,0.250000,0.500000,0.250000\n"
        b"10.png,0,1.000000,0.000000,0.000000\n"
        b'"a,b.png",2,0.333333,0.000000,0.666667\n'
    )
    assert written(tmp_path / "sub.csv", predictions(probabilities=SHARES)) == expected


def test_neurips_bytes(tmp_path: Path) -> None:
    expected = b'2.png,1\n10.png,0\n"a,b.png",2\n'
    assert written(tmp_path / "sub.csv", predictions(), format="neurips") == expected


def test_json_bytes(tmp_path: Path) -> None:
    said = predictions(ids=["x/2.png", "010.JPEG", "7"])
    expected = (
        b'[\n{"image_id": 2, "category_id": 1},\n{"image_id": 10, "category_id": 0},\n'
        b'{"image_id": 7, "category_id": 2}\n]\n'
    )
    assert written(tmp_path / "sub.json", said) == expected
    assert json.loads(expected)[1] == {"image_id": 10, "category_id": 0}


def test_json_bytes_with_probabilities(tmp_path: Path) -> None:
    said = predictions(ids=["2.png"], labels=[1], probabilities=SHARES[:1])
    content = written(tmp_path / "sub.json", said)
    entry = b'{"image_id": 2, "category_id": 1, "probabilities": [0.250000, 0.500000, 0.250000]}'
    assert content == b"[\n" + entry + b"\n]\n"


def test_cells_are_quoted_where_a_reader_needs_it(tmp_path: Path) -> None:
    ids = ['say "a".png', "a\nb", "a\rb", " a", "a ", "é.png", "plain name.png"]
    content = written(tmp_path / "sub.csv", predictions(ids=ids, labels=[0] * 7))
    assert content.decode() == (
        'image_id,label\n"say ""a"".png",0\n"a\nb",0\n"a\rb",0\n" a",0\n"a ",0\né.png,0\n'
        "plain name.png,0\n"
    )


def test_probabilities_a_hair_outside_are_clipped_without_a_sign(tmp_path: Path) -> None:
    shares = [[1.000001, -1e-9, -0.0]]
    said = predictions(ids=["a"], labels=[0], probabilities=shares)
    assert b"a,0,1.000000,0.000000,0.000000\n" in written(tmp_path / "sub.csv", said)


def test_many_rows_keep_their_order(tmp_path: Path) -> None:
    count = 10_001  # several chunks
    ids = [f"{(index * 7919) % count}.png" for index in range(count)]
    labels = np.arange(count) % 3
    path = tmp_path / "sub.csv"
    write_predictions(path, predictions(ids=ids, labels=labels))
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    expected = [[name, str(label)] for name, label in zip(ids, labels, strict=True)]
    assert rows[1:] == expected


# --- round trips

nasty = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
awkward = st.text(st.sampled_from(list("\"',;\n\r\t =é ab")), min_size=1, max_size=6)


def rows_of(path: Path) -> list[list[str]]:
    """As an independent reader finds them."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@given(
    ids=st.lists(awkward | nasty, min_size=1, max_size=8, unique=True),
    format=st.sampled_from(["csv", "neurips"]),
    with_shares=st.booleans(),
    seed=st.integers(0, 99),
)
def test_csv_round_trip(tmp_path_factory, ids, format, with_shares, seed) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(3), len(ids)) if with_shares else None
    said = predictions(ids=ids, labels=rng.integers(0, 3, len(ids)), probabilities=shares)
    path = tmp_path_factory.mktemp("round") / "sub.csv"
    write_predictions(path, said, format=format)
    rows = rows_of(path)[format == "csv" :]
    assert [row[:2] for row in rows] == [[n, str(k)] for n, k in zip(ids, said.labels, strict=True)]
    if shares is not None:
        read = [[float(cell) for cell in row[2:]] for row in rows]
        np.testing.assert_allclose(read, shares, atol=5.1e-7)


@given(st.lists(st.integers(0, 10**12), min_size=1, unique=True), st.booleans())
def test_json_round_trip(tmp_path_factory, numbers, with_shares) -> None:
    shares = np.tile(SHARES[0], (len(numbers), 1)) if with_shares else None
    labels = np.arange(len(numbers)) % 3
    said = predictions([f"{n}.png" for n in numbers], labels, probabilities=shares)
    path = tmp_path_factory.mktemp("round") / "sub.json"
    write_predictions(path, said)
    expected = [
        {"image_id": number, "category_id": label}
        | ({"probabilities": SHARES[0]} if with_shares else {})
        for number, label in zip(numbers, labels.tolist(), strict=True)
    ]
    assert json.loads(path.read_text()) == expected


@given(names=st.lists(awkward | nasty, min_size=2, max_size=5, unique=True))
def test_class_names_round_trip(tmp_path_factory, names) -> None:
    names = [f"x{name}" for name in names]
    folder = tmp_path_factory.mktemp("round")
    said = predictions(labels=[1, 0, 1], class_names=names)
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image_id", "label"], *([name, names[0]] for name in IDS)])
    write_predictions(folder / "sub.csv", said, template=folder / "t.csv")
    assert [row[1] for row in rows_of(folder / "sub.csv")[1:]] == [names[1], names[0], names[1]]


def test_the_same_predictions_give_the_same_bytes(tmp_path: Path) -> None:
    said = predictions(probabilities=SHARES)
    arrays = predictions(ids=np.array(IDS), probabilities=SHARES)
    assert written(tmp_path / "a.csv", said) == written(tmp_path / "b.csv", arrays)


# --- the profile


@pytest.mark.parametrize(
    ("name", "format", "choice"),
    [
        ("a.csv", None, "csv"),
        ("a.JSON", None, "json"),
        ("a.txt", "neurips", "neurips"),
        ("a.csv", "json", "json"),
    ],
)
def test_choose_format(name: str, format: str | None, choice: str) -> None:
    assert choose_format(Path(name), format) == choice


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("a.txt", None, "a.txt: expected the ending .csv or .json, or --format, found .txt."),
        ("sub", None, "sub: expected the ending .csv or .json, or --format, found no ending."),
        ("a.csv", "xml", "--format: expected one of csv, json, neurips, found xml."),
    ],
)
def test_unknown_format(name: str, format: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_format(Path(name), format)


@pytest.mark.parametrize("name", ["a.png", "1a.png", "-1.png", "1.2.png", "1/a.png", "²", ".png"])
def test_json_wants_integer_names(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name!r}: expected an integer file name")):
        integer_ids(["1.png", name])


@pytest.mark.parametrize("pair", [("1.png", "01.png"), ("1.png", "1.jpg"), ("a/1.png", "b/1.png")])
def test_json_wants_distinct_integers(pair: tuple[str, str], tmp_path: Path) -> None:
    said = predictions(ids=[*pair, "2.png"])
    message = f"'{pair[1]}': expected one image 1, found also '{pair[0]}'."
    with pytest.raises(ValueError, match=re.escape(message)):
        write_predictions(tmp_path / "sub.json", said)
    assert list(tmp_path.iterdir()) == []


# --- templates


@pytest.mark.parametrize(
    ("text", "expected"),
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
    ],
)  # fmt: skip
def test_template(tmp_path: Path, text: str, expected: str) -> None:
    content = written(tmp_path / "o.csv", predictions(), template=template(tmp_path, text))
    assert content.decode() == expected


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
def test_template_with_probabilities(tmp_path, header, cells, wanted, label) -> None:
    filler = ",".join([wanted, *["0"] * (header.count(",") - 1)])
    path = template(tmp_path, f"{header}\n1.png,{filler}\n")
    said = predictions(ids=["1.png"], labels=[1], probabilities=SHARES[:1])
    assert plan_layout("csv", ["1.png"], NAMES, path).needs_probabilities
    content = written(tmp_path / "o.csv", said, template=path)
    assert content.decode() == f"{header}\n1.png,{cells.format(label=label)}\n"


def test_integer_class_names_are_written_as_names_where_the_template_shows_them(tmp_path) -> None:
    names = ["10", "20", "30"]
    path = template(tmp_path, 'id,y\n2.png,30\n10.png,10\n"a,b.png",10\n')
    content = written(tmp_path / "o.csv", predictions(class_names=names), template=path)
    assert content == b'id,y\n2.png,20\n10.png,10\n"a,b.png",30\n'


def test_template_for_json_and_neurips_gives_the_order(tmp_path: Path) -> None:
    said = predictions(ids=["1.png", "2.png", "3.png"])
    path = template(tmp_path, "id,y\n3.png,0\n1.png,0\n2.png,0\n")
    content = written(tmp_path / "o.json", said, template=path)
    assert [entry["image_id"] for entry in json.loads(content)] == [3, 1, 2]
    path = template(tmp_path, "id,cat,dog,fish\n3.png,0,0,0\n1.png,0,0,0\n2.png,0,0,0\n")
    assert written(tmp_path / "o.json", said, template=path) == content
    path = template(tmp_path, "3.png,cat\n1.png,cat\n2.png,dog\n")
    content = written(tmp_path / "o.csv", said, format="neurips", template=path)
    assert content == b"3.png,fish\n1.png,dog\n2.png,cat\n"


def test_skipped_images_leave_the_template(tmp_path: Path) -> None:
    path = template(tmp_path, 'id,y\n10.png,0\nbad.png,0\n2.png,0\n"a,b.png",0\n')
    content = written(tmp_path / "o.csv", predictions(), template=path, skipped=["bad.png"])
    assert content == b'id,y\n10.png,0\n2.png,1\n"a,b.png",2\n'
    path = template(tmp_path, 'id,y\n10,0\nbad,0\n2,0\n"a,b",0\n')
    content = written(tmp_path / "o.csv", predictions(), template=path, skipped=["bad.png"])
    assert content == b'id,y\n10,0\n2,1\n"a,b",2\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('id,y\n2.png,0\nx.png,0\n10.png,0\n"a,b.png",0\n', "line 3: expected the name of one of the 3 images, found the unknown id 'x.png'."),
        ("id,y\n2.png,0\n10.png,0\n", "line 3, the last: expected a row an image, missing 'a,b.png'."),
        ("id,y\n2.png,0\n", "line 2, the last: expected a row an image, missing '10.png' and 1 more."),
        ('id,y\n2.png,0\n10.png,0\n2.png,0\n"a,b.png",0\n', "line 4: expected each id once, found '2.png' on line 2 too."),
        ('2.png,0\n10.png,0\n"a,b.png",0\n', "line 1: expected a header, found the row of '2.png'."),
        ('id,y\n2.png,0\n10.png,bird\n"a,b.png",0\n', "line 3: expected labels all integers or all class names ('cat, dog, fish'), found 'bird'."),
        ('id,y\n2.png,0\n10.png,cat\n"a,b.png",0\n', "found a name among integers."),
        ('id,y,z\n2.png,0,0\n10.png,0,0\n"a,b.png",0,0\n', "line 1: expected an id, a label and one column a class ('cat, dog, fish'), found 'id, y, z'."),
        ("id,y\n2.png,0\n10.png\n", "line 3: expected 2 cells, found 1"),
        ("id,y\n,0\n", "line 2: expected 2 cells, found 2, the id ''"),
        ("id\n2.png\n", "expected a header and rows of an id and a label, found none."),
        ("id,y\n", "expected a header and rows of an id and a label, found none."),
        ("", "expected a header and rows of an id and a label, found none."),
        ('id,y\n"2.png,0\n', "line 2: expected a closing quote"),
        ("id,y\n2.png,0\udcff\n", "line 2: expected UTF-8 text, found the byte 0xff"),
    ],
)  # fmt: skip
def test_faulty_templates(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        write_predictions(tmp_path / "o.csv", predictions(), template=path)
    assert str(raised.value).startswith(f"{path}: ")
    assert list(tmp_path.iterdir()) == [path]


def test_template_and_probabilities_must_agree(tmp_path: Path) -> None:
    path = template(tmp_path, 'id,y\n2.png,0\n10.png,0\n"a,b.png",0\n')
    with pytest.raises(ValueError, match="expected probability columns, found none"):
        write_predictions(tmp_path / "o.csv", predictions(probabilities=SHARES), template=path)
    path = template(tmp_path, 'id,cat,dog,fish\n2.png,0,0,0\n10.png,0,0,0\n"a,b.png",0,0,0\n')
    with pytest.raises(ValueError, match="wants probability columns; give --probabilities"):
        write_predictions(tmp_path / "o.csv", predictions(), template=path)


def test_a_template_that_is_json_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.json: expected a CSV file as the template"):
        read_template(tmp_path / "t.json")
    with pytest.raises(FileNotFoundError):
        read_template(tmp_path / "t.csv")


# --- what is not written


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (predictions(ids=[], labels=[]), "expected at least one prediction"),
        (predictions(ids=["a", "b", "a"]), "'a': expected each image once, found it 2 times."),
        (predictions(ids=["a", "\udcff.png", "b"]), "'\\udcff.png': expected a file name in UTF-8"),
        (predictions(labels=[0, 3, 0]), "expected labels from 0 to 2, found 3 for 10.png."),
        (predictions(labels=[0, 0, -1]), "expected labels from 0 to 2, found -1 for a,b.png."),
        (predictions(probabilities=[*SHARES[:2], [0, np.nan, 1]]), "found [0.0, nan, 1.0] for a,b"),
        (predictions(probabilities=[[0, 1.1, 0], *SHARES[:2]]), "from 0 to 1, found [0.0, 1.1"),
    ],
)
def test_unsound_predictions(tmp_path: Path, said: Predictions, message: str) -> None:
    path = tmp_path / "sub.csv"
    path.write_text("kept")
    with pytest.raises(ValueError, match=re.escape(message)):
        write_predictions(path, said)
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def broken(layout, predictions):
        yield "image_id,label\n" * 100_000
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("robust_submission.prediction.formats._csv_lines", broken)
    with pytest.raises(ValueError, match=r"sub\.csv: not written: No space left on device\."):
        write_predictions(tmp_path / "sub.csv", predictions())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    real = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *args, **options: real(
            Path("/dev/full") if "w" in mode else self, mode, *args, **options
        ),
    )
    with pytest.raises(ValueError, match="not written: No space left on device"):
        write_predictions(tmp_path / "sub.csv", predictions())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the existing folder"):
        write_predictions(tmp_path / "no" / "sub.csv", predictions())
