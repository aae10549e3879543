"""Sources of image files and the embedded digits: ids, order, labels and every fault."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from robust_submission.data.inspection import inspect_data
from robust_submission.data.sources import Columns, available_splits, open_source


def make(root: Path, *names: str) -> Path:
    """Tiny images whose grey level is their place in `names`."""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), level).save(root / name)
    return root


def test_digits_are_those_of_scikit_learn_split_once_and_for_all() -> None:
    pixels = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)
    originals = np.rint(pixels * 255 / 16).astype(np.uint8)
    train, test = (open_source("digits", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert test.labels is not None and set(np.bincount(test.labels)) <= {35, 36, 37}
    assert (train.class_names, test.ids[0]) == ([str(digit) for digit in range(10)], "00000.png")
    assert np.array_equal(open_source("digits", split="test").labels, test.labels)  # type: ignore[arg-type]
    ours = [part.image(index) for part in (train, test) for index in range(len(part))]
    assert all(image.shape == (8, 8, 3) and (image == image[:, :, :1]).all() for image in ours)
    assert sorted(image[:, :, 0].tobytes() for image in ours) == sorted(
        image.tobytes() for image in originals
    )


def test_images_come_in_natural_order_with_relative_names(tmp_path: Path) -> None:
    names = ["10.png", "2.png", "b/1.JPG", "a10/1.png", "a9/1.png", "1.png", "x.webp"]
    source = open_source("images", make(tmp_path, *names))
    expected = ["1.png", "2.png", "10.png", "a9/1.png", "a10/1.png", "b/1.JPG", "x.webp"]
    assert source.ids.tolist() == expected
    assert (source.labels, source.class_names) == (None, None)
    for index, name in enumerate(expected):
        assert abs(int(source.image(index)[0, 0, 0]) - names.index(name)) <= 1


def test_images_leave_out_hidden_and_other_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "1.png", ".hidden.png", ".thumbnails/2.png", "d/3.AVIF")
    for name in ("notes.txt", "d/10.csv", "d/9.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert open_source("images", tmp_path).ids.tolist() == ["1.png", "d/3.AVIF"]
    left_out = "3 left out, files that are no images: d/9.csv; d/10.csv; notes.txt."
    assert caplog.messages == [f"{tmp_path}: {left_out}"]


@pytest.mark.parametrize(
    "litter",
    ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "#recycle", "$RECYCLE.BIN", "lost+found"],
)
def test_what_systems_leave_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, litter: str
) -> None:
    real = ["train/a/0.png", "train/b/0.png", "test/a/0.png"]
    names = [f"{litter}/a/1.png", f"train/{litter}/1.png", f"train/a/{litter}/1.png"]
    make(tmp_path, *real, *names, "train/a/._0.png")
    (tmp_path / "train/b/Thumbs.db").write_bytes(b"\xff\xd8\xff")
    source = open_source("folder", tmp_path)
    assert source.class_names == ["a", "b"] and source.ids.tolist() == ["a/0.png", "b/0.png"]
    assert open_source("images", tmp_path).ids.tolist() == sorted(real)
    assert not caplog.messages
    rows = [f"{name},{name.split('/')[-2]}\n" for name in (*real, "train/a/._0.png", *names)]
    (tmp_path / "list.csv").write_text("image,label\n" + "".join(rows))
    assert open_source("csv", tmp_path / "list.csv").class_names == ["a", "b"]
    assert "4 left out, files that are no images" in caplog.messages[0]


def test_names_with_numbers_in_any_script_are_ordered(tmp_path: Path) -> None:
    source = open_source("images", make(tmp_path, "٣.png", "3.png", "a٣.png", "a3.png", "03.png"))
    assert source.ids.tolist()[:2] == ["03.png", "3.png"]
    assert len(source) == 5


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "expected images .* found an empty folder"),
        (lambda root: (root / "a.txt").touch(), "expected images .* found none among 1 files"),
        (lambda root: root.rmdir(), "expected a folder of images, found nothing there"),
        (lambda root: (root.rmdir(), root.touch()), "expected a folder of images, found a file"),
    ],
)
def test_a_folder_without_images_is_named(tmp_path: Path, prepare: object, message: str) -> None:
    root = tmp_path / "images"
    root.mkdir()
    prepare(root)  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"images: {message}"):
        open_source("images", root)


def test_folder_orders_integer_classes_as_numbers_and_others_as_strings(tmp_path: Path) -> None:
    root = make(tmp_path / "a", *(f"train/{label}/0.png" for label in (0, 1, 10, 11, 2)))
    source = open_source("folder", root)
    assert source.class_names == ["0", "1", "2", "10", "11"]
    assert source.ids.tolist() == ["0/0.png", "1/0.png", "2/0.png", "10/0.png", "11/0.png"]
    assert source.labels is not None and source.labels.tolist() == [0, 1, 2, 3, 4]
    assert source.image(3)[0, 0, 0] == 2
    root = make(tmp_path / "b", "train/b10/0.png", "train/b9/0.png", "train/A/0.png")
    assert open_source("folder", root).class_names == ["A", "b10", "b9"]


def test_folder_keeps_the_labels_of_train_in_a_smaller_test(tmp_path: Path) -> None:
    root = make(tmp_path, "train/a/0.png", "train/b/0.png", "train/c/0.png", "test/c/x/0.png")
    source = open_source("folder", root, "test")
    assert source.class_names == ["a", "b", "c"]
    assert source.labels is not None
    assert (source.ids.tolist(), source.labels.tolist()) == (["c/x/0.png"], [2])


def test_folder_without_splits_holds_the_classes(tmp_path: Path) -> None:
    root = make(tmp_path, "train/0.png", "plane/0.png")  # two kinds of vehicle
    assert open_source("folder", root).class_names == ["plane", "train"]
    assert len(open_source("folder", root, "test")) == 2
    with pytest.raises(ValueError, match=r"expected the folder val .* class folders without"):
        open_source("folder", root, "val")


@pytest.mark.parametrize(
    ("names", "empty", "split", "message"),
    [
        (["train/a/0.png"], "train/b", "train", "train/b: expected images"),
        (["train/a/0.png"], None, "val", "expected the folder val .* found only train"),
        (["train/a/0.png", "test/b/0.png"], None, "test", "test/b: expected one of the 1 classes"),
        (["0.png"], None, "train", "expected one folder for each class, found none"),
    ],
)
def test_faults_of_class_folders_are_named(
    tmp_path: Path, names: list[str], empty: str | None, split: str, message: str
) -> None:
    root = make(tmp_path, *names)
    if empty:
        (root / empty).mkdir()
    with pytest.raises(ValueError, match=message):
        open_source("folder", root, split)


@pytest.mark.parametrize(
    ("names", "within"),
    [
        (("d/train/a/0.png", "d/train/b/0.png", "d/test/a/0.png"), "d"),
        (("d/a/0.png", "d/b/0.png"), "d"),
        (("d/e/Train/a/0.png", "d/e/Test/a/0.png"), "d/e"),
        (("c/train/a/0.png", "c/test/a/0.png", "d/0.png"), "c"),
    ],
)
def test_data_below_root_are_pointed_at(
    tmp_path: Path, names: tuple[str, ...], within: str
) -> None:
    message = f"^{tmp_path}: expected one folder .* found data in .: see data.root {tmp_path}/"
    with pytest.raises(ValueError, match=f"{message}{within}.$"):
        open_source("folder", make(tmp_path, *names))


def test_columns_are_refused_where_nothing_reads_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected none but with hf, found one with csv"):
        open_source("csv", tmp_path / "a.csv", columns=Columns(label="diagnosis"))


def test_splits_without_class_folders_are_no_classes(tmp_path: Path) -> None:
    message = f"^{tmp_path}: expected class folders in Test and train, .* found images directly"
    with pytest.raises(ValueError, match=message):
        open_source("folder", make(tmp_path, "Test/0.png", "train/0.png"))
    assert open_source("folder", make(tmp_path, "cars/0.png")).class_names == [
        "Test",
        "cars",
        "train",
    ]


@pytest.mark.parametrize(
    ("called", "said"),
    [
        ({"train": "Train", "test": "TEST"}, ["taken TEST as test, Train as train."]),
        (
            {"train": "training", "val": "valid", "test": "Testing"},
            ["taken Testing as test, training as train, valid as val."],
        ),
        ({"train": "train", "val": "Validation"}, ["taken Validation as val."]),
        ({"train": "train", "val": "dev", "test": "test"}, ["taken dev as val."]),
        ({"train": "train", "test": "test"}, []),
    ],
)
def test_splits_by_their_usual_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, called: dict[str, str], said: list[str]
) -> None:
    for level, folder in enumerate(called.values()):
        make(tmp_path, *(f"{folder}/{name}/{level}.png" for name in "ab"), "more/a/0.png")
    said = [*said, "1 left out, folders that are no split of class folders: more."]
    (tmp_path / "list.csv").write_text(
        "image,label,split\n"
        + "".join(f"{f}/{n}/{i}.png,{n},{f}\n" for i, f in enumerate(called.values()) for n in "ab")
    )
    for name, root in (("folder", tmp_path), ("csv", tmp_path / "list.csv")):
        assert available_splits(name, root) == tuple(called)
        for level, split in enumerate(called):
            ids = open_source(name, root, split).ids.tolist()
            assert [Path(each).name for each in ids] == 2 * [f"{level}.png"]
    assert [each for each in caplog.messages if "csv" not in each] == [
        f"{tmp_path}: {each}" for each in said
    ]


def test_images_beside_class_folders_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "train/a/0.png", "train/b/0.png", "train/10.png", "train/9.png", "test/0.png")
    (tmp_path / "train/list.txt").touch()
    assert len(open_source("folder", tmp_path)) == 2
    assert caplog.messages == [
        f"{tmp_path}: 1 left out, folders that are no split of class folders: test.",
        f"{tmp_path}/train: 2 left out, images in no class folder: 9.png; 10.png.",
    ]


def test_two_names_for_one_split_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "train/a/0.png", "val/a/0.png", "valid/a/0.png")
    with pytest.raises(ValueError, match=f"^{tmp_path}: expected one split val, found val, valid"):
        open_source("folder", tmp_path)


def test_challenge_labels_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    root = make(tmp_path, "images/0.JPEG", "images/1.JPEG", "images/2.JPEG")
    (root / "label.txt").write_text("2.JPEG 5\n0.JPEG 10\n1.JPEG 0\n")
    source = open_source("challenge", root)
    assert source.ids.tolist() == ["2.JPEG", "0.JPEG", "1.JPEG"]
    assert source.labels is not None
    assert source.labels.tolist() == [5, 10, 0]
    assert source.class_names == [str(label) for label in range(11)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.JPEG 1\n1.JPEG\n", "label.txt: line 2: expected a name and an integer label"),
        ("0.JPEG 1\n\n1.JPEG 2\n", "label.txt: line 2: .* found ''"),
        ("0.JPEG cat\n", "line 1: .* found '0.JPEG cat'"),
        ("0.JPEG -1\n", "line 1: "),
        ("0.JPEG 1 2\n", "line 1: "),
        ("0.JPEG 1\n0.JPEG 2\n", "line 2: expected each image once, found '0.JPEG' again"),
        ("0.JPEG 1\n./0.JPEG 2\n", "line 2: expected each image once"),
        ("0.JPEG 1\n9.JPEG 2\n", "line 2: expected the image .*9.JPEG, found nothing there"),
        ("", "label.txt: expected a line for each image .* found none"),
        (None, "label.txt: expected .* found nothing there"),
    ],
)
def test_faults_of_label_txt_are_named_with_their_line(
    tmp_path: Path, text: str | None, message: str
) -> None:
    root = make(tmp_path, "images/0.JPEG", "images/1.JPEG")
    if text is not None:
        (root / "label.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source("challenge", root)


def manifest(tmp_path: Path, text: str) -> Path:
    make(tmp_path, "a.png", "b c.png", "d/e.png")
    path = tmp_path / "list.csv"
    path.write_text(text)
    return path


def test_a_class_folder_of_another_encoding_is_named(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    (tmp_path / "train/a").rename(os.fsdecode(os.fsencode(tmp_path) + b"/train/caf\xe9"))
    with pytest.raises(ValueError, match=r"expected file names in UTF-8, found b'caf\\xe9'"):
        open_source("folder", tmp_path)


def test_csv_with_names_and_splits(tmp_path: Path) -> None:
    text = "label,split,image\ndog,train,a.png\ncat,val,b c.png\ndog,train,d/e.png\n"
    path = manifest(tmp_path, text)
    assert available_splits("csv", path) == ("train", "val")
    train, validation = open_source("csv", path), open_source("csv", path, "val")
    assert train.class_names == validation.class_names == ["cat", "dog"]
    assert train.labels is not None and validation.labels is not None
    assert (train.ids.tolist(), train.labels.tolist()) == (["a.png", "d/e.png"], [1, 1])
    assert (validation.ids.tolist(), validation.labels.tolist()) == (["b c.png"], [0])
    assert train.image(1)[0, 0, 0] == 2


def test_csv_with_integer_labels_as_written(tmp_path: Path) -> None:
    path = manifest(tmp_path, '\ufeffimage,label\r\n"a.png",10\r\nb c.png, 2 \r\n')
    source = open_source("csv", path)
    assert source.labels is not None and source.labels.tolist() == [10, 2]
    assert source.class_names == [str(label) for label in range(11)]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("image;label\nd/e.png;1\na.png;0\n", "utf-8"),
        ("image\tlabel\r\nd/e.png\t1\r\na.png\t0\r\n", "utf-16"),
        (",image,label,note,\n0,d/e.png,1,x,\n1,a.png,0,,\n", "utf-16-le"),
    ],
)
def test_csv_of_other_tools(tmp_path: Path, text: str, encoding: str) -> None:
    path = manifest(tmp_path, "")
    path.write_bytes(text.encode(encoding))
    source = open_source("csv", path)
    assert source.labels is not None and source.labels.tolist() == [1, 0]
    assert source.ids.tolist() == ["d/e.png", "a.png"]


def test_csv_of_shards(tmp_path: Path) -> None:
    """labels.csv in each shard, as pandas writes it, of the images in its folder images."""
    make(tmp_path, "shard_0/images/a.jpg", "shard_0/images/b.jpg", "shard_1/images/a.jpg")
    for shard, rows in enumerate(
        (",image_name,label\n0,b.jpg,1\n1,a.jpg,0\n", ",image_name,label\n0,a.jpg,1\n")
    ):
        (tmp_path / f"shard_{shard}/labels.csv").write_text(rows)
    source, shard = (
        open_source("csv", tmp_path),
        open_source("csv", tmp_path / "shard_1/labels.csv"),
    )
    assert source.ids.tolist() == [
        f"shard_{name}.jpg" for name in ("0/images/b", "0/images/a", "1/images/a")
    ]
    assert source.labels is not None and source.labels.tolist() == [1, 0, 1]
    assert [source.image(index)[0, 0, 0] for index in range(3)] == [1, 0, 2]
    assert shard.ids.tolist() == ["images/a.jpg"]
    (tmp_path / "shard_1/images/z.jpg").write_bytes(b"")
    unread = inspect_data("csv", tmp_path, workers=1).unread
    assert unread == [f"{tmp_path}/shard_1/images/z.jpg: not listed"]
    with (tmp_path / "shard_1/labels.csv").open("a") as file:
        file.write("1,c.jpg,0\n")
    with pytest.raises(ValueError, match=r"shard_1/labels.csv: line 3: .*shard_1/images/c.jpg"):
        open_source("csv", tmp_path)
    (tmp_path / "shard_1/labels.csv").write_text("image_name,label,split\na.jpg,1,train\n")
    with pytest.raises(ValueError, match=r"shard_0/labels.csv: line 2: expected a column split"):
        open_source("csv", tmp_path)
    with pytest.raises(ValueError, match=r"or labels\.csv in a folder, found none"):
        open_source("csv", tmp_path / "shard_0/images")


def test_csv_names_images_in_another_form_of_unicode(tmp_path: Path) -> None:
    make(tmp_path, "cafe\u0301.png", "caf\xe8.png")
    (tmp_path / "list.csv").write_text("image,label\ncaf\xe9.png,0\ncafe\u0300.png,1\n")
    source = open_source("csv", tmp_path / "list.csv")
    assert source.ids.tolist() == ["cafe\u0301.png", "caf\xe8.png"] and source.image(1).max() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na.png,1\n", "expected the columns image,label"),
        ("image,label\na.png,1\nb c.png\n", "line 3: expected 2 filled cells"),
        ("image,label\na.png,1,2\n", "line 2: expected 2 filled cells"),
        ("image,label\na.png,\n", "line 2: expected 2 filled cells"),
        ("image,label\na.png,1\na.png,1\n", "line 3: expected each image once"),
        ("image,label\na.png,1\n./a.png,1\n", r"line 3: expected .* found './a.png' again"),
        ("image,label,split\na.png,1,train\na.png,1,test\n", "line 3: expected each image once"),
        ("image,label\na.png,5.0\n", "line 2: expected an integer from 0 .* found '5.0'"),
        ("image,label\na.png,5\nb c.png,-1\n", "line 3: expected an integer from 0 .* '-1'"),
        ("image,label\nz.png,1\n", "line 2: expected the image .*z.png, found nothing"),
        ("image,label,split\na.png,1,extra\n", "line 2: expected the split train, val, test"),
        ("image,label,split\na.png,1,test\n", "expected rows of the split train, found test"),
        ("image,label\n", "expected a row for each image, found none"),
        ('image,label\n"a.png,1\n', "list.csv: line 2: expected"),
        ("", "expected the columns image,label"),
    ],
)
def test_faults_of_a_manifest_are_named_with_their_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_source("csv", manifest(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "root", "split", "message"),
    [
        ("mnist", None, "train", r"data.name: expected one of digits.* found 'mnist'"),
        ("digits", None, "dev", "split: expected one of train, val, test, found 'dev'"),
        ("digits", None, "val", "expected the split train or test, found 'val'"),
        ("folder", None, "train", r"data.root: expected the place of the source folder"),
        ("digits", Path(), "train", r"data.root: expected none with the embedded digits"),
    ],
)
def test_unknown_names_and_splits_are_refused(
    name: str, root: Path | None, split: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(name, root, split)


def test_available_splits(tmp_path: Path) -> None:
    assert available_splits("digits") == ("train", "test")
    assert available_splits("folder", make(tmp_path, "plane/0.png")) == ()
    make(tmp_path, "train/a/0.png", "val/a/0.png")
    assert available_splits("folder", tmp_path) == ("train", "val")


def test_listing_many_files_is_fast_and_lean(tmp_path: Path) -> None:
    """20,000 names: one array that is not larger than its letters, in well under a second."""
    (tmp_path / "images").mkdir()
    for index in range(20_000):
        (tmp_path / "images" / f"{index}.png").touch()
    start = time.perf_counter()
    source = open_source("images", tmp_path / "images")
    assert time.perf_counter() - start < 2
    assert source.ids.nbytes == 20_000 * len("19999.png") * 4
    assert source.ids[[0, 9, 19_999]].tolist() == ["0.png", "9.png", "19999.png"]
