"""WebDataset shards: read like the same files in folders, every fault named, made reproducibly."""

import io
import json
import tarfile
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.make_shards import DataOptions, Options, make_shards
from robust_submission.data.loader import Batch, ImageDataset, evaluation_loader, training_loader
from robust_submission.data.sources import Source, available_splits, open_source
from tests.conftest import ROOT, run_command

RNG = np.random.default_rng(0)
CIFAR10 = ROOT.parent / "shared/data/cifar10-jpeg.tar.gz"
CLASSES = ["airplane", "automobile", "bird"]
Member = tuple[str, bytes]


def picture(level: int, ending: str = "png") -> bytes:
    """A 2 x 2 image of one grey level."""
    content = io.BytesIO()
    Image.new("L", (2, 2), level).save(content, {"jpg": "JPEG"}.get(ending, ending))
    return content.getvalue()


def write(path: Path, *members: Member, format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def sample(key: str, label: int, level: int = 0) -> tuple[Member, Member]:
    return (f"{key}.png", picture(level)), (f"{key}.cls", str(label).encode())


def assert_same_images(one: Source, other: Source) -> None:
    assert len(one) == len(other)
    assert np.array_equal(one.labels, other.labels)  # type: ignore[arg-type]
    assert one.class_names == other.class_names
    assert all(np.array_equal(one.image(i), other.image(i)) for i in range(len(one)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files, 24 of each class in train/ and 4 in test/; CIFAR-10's where they are at hand."""
    root = tmp_path_factory.mktemp("folder")
    for split, first, last in (("train", 0, 24), ("test", 24, 28)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(first, last):
                pixels = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:04d}.jpg")
    if CIFAR10.is_file():
        with tarfile.open(CIFAR10) as tar:
            for member in takewhile(lambda member: "cat" not in member.name, tar):
                for path in root.glob(f"*/{member.name.removeprefix('train/')}"):
                    if file := tar.extractfile(member):
                        path.write_bytes(file.read())
    return root


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards of 10 images, written by tarfile alone."""
    root = tmp_path_factory.mktemp("shards")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split in ("train", "test"):
        files = sorted((folder / split).glob("*/*.jpg"))
        rows = [
            [
                (f"{index}.jpg", file.read_bytes()),
                (f"{index}.cls", b"%d\n" % CLASSES.index(file.parent.name)),
            ]
            for index, file in enumerate(files)
        ]
        for shard in range(0, len(rows), 10):
            members = [member for row in rows[shard : shard + 10] for member in row]
            write(root / split / f"{shard // 10}.tar", *members)
    return root


def test_a_sample_is_the_members_of_one_key(tmp_path: Path) -> None:
    write(
        tmp_path / "0.tar",
        ("b/1.v2.JPG", b"another picture of b/1, under another ending"),
        *[("b/1.PNG", picture(10)), ("b/1.json", json.dumps({"label": 7}).encode())],
        *[("b/1.cls", b" 02\n"), ("b/1.txt", b"a caption")],  # .cls goes before .json
        *[("a.1/2.jpg", picture(20, "jpg")), ("README", b""), (".hidden.png", b"")],
        *[("a.1/2.json", b'{"caption": "a cat", "label": 0}'), ("__index__.json", b"{}")],
    )
    source = open_source("shards", tmp_path)
    assert source.ids.tolist() == ["b/1.PNG", "a.1/2.jpg"]
    assert source.labels is not None and source.labels.dtype == np.int64
    assert source.labels.tolist() == [2, 0]
    assert source.class_names == ["0", "1", "2"]
    assert [source.image(index).tolist() for index in (0, 1)] == [
        [[[g] * 3] * 2] * 2 for g in (10, 20)
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_with_links_and_long_names(tmp_path: Path, format: int) -> None:
    key = "/".join(["x" * 60] * 3) if format == tarfile.USTAR_FORMAT else "ü" * 150
    path = write(tmp_path / "0.tar", *sample("a", 0, 1), *sample(key, 1, 2), format=format)
    with tarfile.open(path, "a", format=format) as tar:
        for kind, name in ((tarfile.DIRTYPE, "b.png"), (tarfile.SYMTYPE, "c.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.png"
            tar.addfile(link)
    source = open_source("shards", tmp_path)
    assert source.ids.tolist() == ["a.png", f"{key}.png"]
    assert [int(source.image(index)[0, 0, 0]) for index in (0, 1)] == [1, 2]


def test_shards_come_in_natural_order(tmp_path: Path) -> None:
    for shard in (10, 9, 1):
        write(tmp_path / f"part-{shard}.tar", *sample(f"z{shard}", 0), *sample(f"a{shard}", 0))
    (tmp_path / "._part-1.tar").write_bytes(b"left by a Mac")
    ids = open_source("shards", tmp_path).ids.tolist()
    assert ids == [f"{letter}{shard}.png" for shard in (1, 9, 10) for letter in "za"]


def test_shards_equal_the_folder_image_by_image(folder: Path, shards: Path) -> None:
    assert available_splits("shards", shards) == ("train", "test")
    for split in ("train", "test"):
        source = open_source("shards", shards, split)
        assert_same_images(source, open_source("folder", folder, split))
    with pytest.raises(ValueError, match="expected the folder val of shards, found only train, te"):
        open_source("shards", shards, "val")


def test_undivided_shards_are_all_of_train_and_of_test(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", *sample("a", 1))
    assert available_splits("shards", tmp_path) == ()
    assert_same_images(open_source("shards", tmp_path), open_source("shards", tmp_path, "test"))
    with pytest.raises(ValueError, match=r"expected the folder val .* found shards without splits"):
        open_source("shards", tmp_path, "val")


def test_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    for split, label in (("train", 4), ("val", 2), ("test", 0)):
        write(tmp_path / split / "0.tar", *sample("a", label))
    names = [open_source("shards", tmp_path, split).class_names for split in ("train", "test")]
    assert names == [["0", "1", "2", "3", "4"]] * 2


def bytes_of(batch: Batch) -> bytes:
    return b"".join(batch[name].numpy().tobytes() for name in ("images", "labels", "indices"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_no_batch(folder: Path, shards: Path, method: str) -> None:
    batches = list[list[bytes]]()
    for name, root, workers in (
        ("folder", folder, 0),
        ("shards", shards, 0),
        ("shards", shards, 2),
    ):
        dataset = ImageDataset(open_source(name, root), None, 24)
        loader = training_loader(dataset, batch_size=16, num_workers=workers, seed=0)
        loader._loader.multiprocessing_context = method if workers else None
        if workers:
            dataset.source.image(0)  # an image read before the workers start
        loader.set_epoch(3)
        batches.append([bytes_of(batch) for batch in loader])
    assert batches[0] == batches[1] == batches[2]
    assert len(batches[0]) == 72 // 16


def test_unreadable_images_are_named_or_skipped(tmp_path: Path) -> None:
    bad = [("b.png", b""), ("b.cls", b"0"), ("c.jpg", b"no image"), ("c.cls", b"0")]
    write(tmp_path / "0.tar", *sample("a", 0), *bad, *sample("d", 0))
    source = open_source("shards", tmp_path)
    for index, message in ((1, "b.png: expected an image file, found 0 bytes"), (2, "c.jpg: exp")):
        with pytest.raises(ValueError, match=rf"0\.tar: {message}"):
            source.image(index)
    dataset = ImageDataset(source, None, 2, skip_bad=True)
    (batch,) = evaluation_loader(dataset, batch_size=4, num_workers=0)
    assert batch["indices"].tolist() == [0, 3]
    assert [skipped.index for skipped in batch["skipped"]] == [1, 2]
    (tmp_path / "0.tar").unlink()
    with pytest.raises(ValueError, match=r"0\.tar: expected an image file, found nothing there"):
        source.image(0)


PNG = picture(0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", PNG)], r"expected a label \(.cls or .json\) with a.png, found none"),
        ([("a.png", PNG), ("a.txt", b"5")], "expected a label .* with a.png, a.txt, found none"),
        ([("a.png", PNG), ("a.cls", b"cat")], "a.cls: expected an integer label .* found b'cat'"),
        ([("a.png", PNG), ("a.cls", b"-1")], "a.cls: expected an integer label from 0 on"),
        ([("a.png", PNG), ("a.cls", b"")], "a.cls: expected .* found b''"),
        ([("a.png", PNG), ("a.cls", b"9" * 5000)], "a.cls: expected an integer label"),
        ([("a.png", PNG), ("a.json", b'{"label": "5"}')], "a.json: expected an integer label"),
        ([("a.png", PNG), ("a.json", b'{"label": true}')], "a.json: expected an integer label"),
        ([("a.png", PNG), ("a.json", b'{"class": 5}')], "a.json: expected an integer label"),
        ([("a.png", PNG), ("a.json", b"[5]")], "a.json: expected an integer label"),
        ([("a.png", PNG), ("a.json", b"[" * 100_000)], "a.json: expected an integer label"),
        ([("a.png", PNG), ("a.cls", b"3")], "a.png: expected a label of the 3 in .*classes.txt"),
        ([*sample("a", 0), *sample("a", 0)], "expected each member once, found 'a.png' again"),
        ([*sample("a", 0), ("a.PNG", PNG)], "expected each member once, found 'a.PNG' again"),
        (
            [*sample("a", 0), ("a.jpg", PNG)],
            "expected one image of the key 'a', found a.png, a.jpg",
        ),
        ([("a.heic", b""), ("a.cls", b"0")], "expected one image of the key 'a', found none"),
        ([("notes.txt", b"")], r"expected images \(KEY.jpg, KEY.png …\), found none"),
        ([], "expected images .*, found none"),
    ],
)
def test_faults_of_samples_are_named(tmp_path: Path, members: list[Member], message: str) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    write(tmp_path / "0.tar", *sample("good", 2))
    write(tmp_path / "1.tar", *members)
    with pytest.raises(ValueError, match=rf"1\.tar: {message}") as caught:
        open_source("shards", tmp_path)
    assert len(str(caught.value)) < 300


def test_a_key_in_two_shards_is_named(tmp_path: Path) -> None:
    for shard in (0, 1):
        write(tmp_path / f"{shard}.tar", *sample(f"only {shard}", 0), *sample("both", 0))
    with pytest.raises(ValueError, match=r"1.tar: .* found 'both.png' again \(first in 0.tar\)"):
        open_source("shards", tmp_path)


@pytest.mark.parametrize("text", ["a\n\nb\n", "a\nb\na\n"])
def test_faults_of_classes_txt_are_named(tmp_path: Path, text: str) -> None:
    write(tmp_path / "0.tar", *sample("a", 0))
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=r"classes.txt: expected another class name in each line"):
        open_source("shards", tmp_path)


def test_folders_without_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: expected a folder of shards, found nothing"):
        open_source("shards", tmp_path / "nowhere")
    (tmp_path / "0.tar.gz").touch()
    with pytest.raises(ValueError, match=r"expected shards \(\*.tar, not compressed\), found none"):
        open_source("shards", tmp_path)
    (tmp_path / "0.tar").mkdir()
    with pytest.raises(ValueError, match=r"0.tar: expected a readable tar, found: Is a directory"):
        open_source("shards", tmp_path)


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tars_are_named(tmp_path: Path, mode: str, kind: str) -> None:
    with tarfile.open(tmp_path / "0.tar", mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=f"expected a whole, uncompressed tar, found {kind} data"):
        open_source("shards", tmp_path)


def test_a_tar_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    content = write(tmp_path / "0.tar", *sample("a", 0), *sample("b", 1)).read_bytes()
    end = len(content.rstrip(b"\0"))
    end += -end % 512  # the last member, padded; a block of zeros comes behind it
    for length in [*range(0, end + 512, 100), end, end + 511]:
        (tmp_path / "0.tar").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"0.tar: expected a whole, .* truncated or damaged"):
            open_source("shards", tmp_path)
    (tmp_path / "0.tar").write_bytes(content[: end + 512])
    assert len(open_source("shards", tmp_path)) == 2


def test_damaged_headers_give_a_value_error_and_an_end(tmp_path: Path) -> None:
    content = write(tmp_path / "0.tar", *sample("a", 0), *sample("b", 1)).read_bytes()
    for place in [*range(148), *range(156, 512)]:  # a checksum has bytes that do not count
        damaged = bytearray(content)
        damaged[1024 + place] ^= int(RNG.integers(1, 256))  # in the second header
        (tmp_path / "0.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"0.tar: expected"):
            open_source("shards", tmp_path)
    backwards = bytearray(content)
    backwards[1024 + 124 : 1024 + 136] = (-1024).to_bytes(12, "big", signed=True)
    backwards[1024 + 148 : 1024 + 156] = b" " * 8
    backwards[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(backwards[1024 : 1024 + 512])
    (tmp_path / "0.tar").write_bytes(backwards)
    with pytest.raises(ValueError, match=r"0.tar: expected a whole, .* damaged"):
        open_source("shards", tmp_path)


def test_made_shards_equal_their_source_and_one_another(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        data = DataOptions(name="folder", root=folder)
        make_shards(Options(data=data, out=tmp_path / name, images_per_shard=50))
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert sorted(map(str, files)) == [
        *("classes.txt", "test/000000.tar", "train/000000.tar", "train/000001.tar")
    ]
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )
    for split in ("train", "test"):
        made = open_source("shards", tmp_path / "one", split)
        assert_same_images(made, open_source("folder", folder, split))
    with tarfile.open(tmp_path / "one/train/000001.tar") as tar:
        last = tar.extractfile("00000071.jpg")
        assert last is not None
        assert last.read() == (folder / "train/bird/0023.jpg").read_bytes()
    with pytest.raises(ValueError, match=r"one: expected nothing there yet, found a folder"):
        make_shards(Options(data=DataOptions(name="folder", root=folder), out=tmp_path / "one"))


def test_shards_appear_whole_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any moment leaves nothing under the folder's name."""
    out = tmp_path / "out"
    seen = list[bool]()

    def full_disk(*_: object) -> tuple[str, bytes]:
        seen.append(out.exists())
        if len(seen) == 80:  # in the second split
            raise OSError("full")
        return ".jpg", b""

    monkeypatch.setattr("data.make_shards._image_file", full_disk)
    with pytest.raises(ValueError, match="not written: full"):
        make_shards(Options(data=DataOptions(name="folder", root=folder), out=out))
    assert not any(seen) and not list(tmp_path.iterdir())


def test_images_without_files_are_made_png(tmp_path: Path) -> None:
    arguments = ("--data.name", "digits", "--split", "test", "--out", tmp_path / "digits")
    done = run_command("data/make_shards.py", *arguments, "--images_per_shard", 200)
    assert done.returncode == 0, done.stderr
    made = open_source("shards", tmp_path / "digits", "test")
    assert made.ids[[0, -1]].tolist() == ["00000000.png", "00000359.png"]
    assert_same_images(made, open_source("digits", split="test"))


def test_training_on_shards_is_training_on_the_folder(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    small = ("--model.backbone", "test_convnext", "--epochs", 2, "--batch_size", 16)
    for name, root, workers in (("folder", folder, 0), ("shards", shards, 2)):
        data = ("--data.name", name, "--data.root", root, "--data.num_workers", workers)
        arguments = (*small, *data, "--data.augmentation", "light", "--output", tmp_path / name)
        done = run_command("training/train.py", *arguments)
        assert done.returncode == 0, done.stderr
    for file in ("metrics.csv", "summary.json", "model.safetensors"):
        assert (tmp_path / "folder" / file).read_bytes() == (
            tmp_path / "shards" / file
        ).read_bytes()
