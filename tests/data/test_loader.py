"""Batches are a function of the seed and the epoch: not of workers, processes, sizes, resumes."""

import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_submission.data.augment import Augmentation
from robust_submission.data.dataset import Batch, ImageDataset
from robust_submission.data.loader import (
    EvaluationLoader,
    MicroBatch,
    TrainingLoader,
    even_size,
    micro_batch_size,
    micro_batches,
    read_ahead,
)
from robust_submission.data.sources import Source, mix_sources, open_source
from robust_submission.data.sources.arrays import ArraySource
from tests.conftest import ROOT

RNG = np.random.default_rng(0)
SIDE = 224
"""Of images of which 32 are a micro-batch."""


@pytest.fixture(scope="module")
def source() -> Source:
    """100 images of noise, larger than they are shown."""
    images = RNG.integers(0, 256, (100, 10, 12, 3), dtype=np.uint8)
    ids = np.array([f"{index}.png" for index in range(100)])
    return ArraySource(
        images=images, labels=RNG.integers(0, 5, 100), class_names=list("abcde"), ids=ids
    )


def training(source: Source, workers: int = 0, seed: int = 0, **shard: int) -> TrainingLoader:
    augmentation = Augmentation(name="light", image_size=8, policy="randaugment", erasing=0.25)
    dataset = ImageDataset(source, np.arange(3, 97), 8, augmentation, seed=seed)
    return TrainingLoader(dataset, batch_size=16, num_workers=workers, seed=seed, **shard)


def bytes_of(batches: Iterable[Batch] | Iterable[MicroBatch]) -> list[tuple[bytes, ...]]:
    names = ("images", "labels", "indices")
    return [tuple(batch[name].numpy().tobytes() for name in names) for batch in batches]


def epochs(loader: TrainingLoader, *numbers: int) -> list[list[tuple[bytes, ...]]]:
    passes = list[list[tuple[bytes, ...]]]()
    for number in numbers:
        loader.set_epoch(number)
        passes.append(bytes_of(loader))
    return passes


def test_a_batch_is_float_rgb_with_its_labels(source: Source) -> None:
    loader = EvaluationLoader(ImageDataset(source, None, 10), batch_size=8, num_workers=0)
    batch = next(iter(loader))
    assert (batch["images"].dtype, batch["images"].shape) == (torch.float32, (8, 3, 10, 10))
    assert batch["images"].is_contiguous()
    expected = np.stack([source.image(index)[:, 1:11] for index in range(8)])
    assert np.array_equal(batch["images"].numpy(), expected.transpose(0, 3, 1, 2) / np.float32(255))
    assert source.labels is not None
    assert batch["labels"].tolist() == source.labels[:8].tolist()
    assert batch["indices"].tolist() == list(range(8))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_nothing(source: Source, method: str) -> None:
    expected = epochs(training(source), 0, 1, 5)
    loader = training(source, workers=2)
    loader._loader.multiprocessing_context = method
    assert epochs(loader, 0, 1, 5) == expected
    assert expected[0] != expected[1]


def test_each_epoch_has_its_order_and_its_augmentation(source: Source) -> None:
    loader = training(source)
    assert len(loader) == 94 // 16
    seen = list[dict[int, bytes]]()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        images = [batch["images"] for batch in loader]
        order = torch.cat([batch["indices"] for batch in loader]).tolist()
        assert len(set(order)) == len(order) == 16 * len(loader)
        assert set(order) <= set(range(3, 97))
        assert order != sorted(order)
        pixels = (image.numpy().tobytes() for image in torch.cat(images))
        seen.append(dict(zip(order, pixels, strict=True)))
    assert list(seen[0]) != list(seen[1])
    common = seen[0].keys() & seen[1].keys()
    assert sum(seen[0][index] != seen[1][index] for index in common) > len(common) / 2


def test_an_image_is_augmented_alike_in_any_subset(source: Source) -> None:
    """Its index in the source counts, not its position in the dataset."""
    augmentation = Augmentation(name="light", image_size=8)
    whole = ImageDataset(source, None, 8, augmentation, seed=1)
    some = ImageDataset(source, np.array([70, 5, 40]), 8, augmentation, seed=1)
    for position, index in enumerate((70, 5, 40)):
        ours, theirs = some[2, position], whole[2, index]
        assert ours["index"] == theirs["index"] == index
        assert np.array_equal(ours["image"], theirs["image"])


def test_the_seed_alone_decides(source: Source) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        epochs(training(source, workers=1, seed=seed), 0, 1) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_continues_exactly(source: Source, workers: int) -> None:
    whole = epochs(training(source), 0, 1, 2)
    assert epochs(training(source, workers), 2) == whole[2:]
    middle = training(source, workers)
    next(iter(middle))  # an abandoned epoch leaves no trace
    middle.set_epoch(1, start_step=3)
    assert bytes_of(middle) == whole[1][3:]
    assert epochs(middle, 2) == whole[2:]


def test_processes_share_each_global_batch(source: Source) -> None:
    whole = list(training(source))
    parts = [list(training(source, process_index=k, num_processes=2)) for k in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for batch, first, second in zip(whole, *parts, strict=True):
        for name in ("images", "labels", "indices"):
            assert torch.equal(batch[name], torch.cat([first[name], second[name]]))


@pytest.mark.parametrize(
    ("size", "batch_size", "processes", "message"),
    [
        (100, 15, 2, "batch_size: expected a multiple of the 2 processes, found 15"),
        (100, 0, 1, "batch_size: expected a multiple of the 1 processes, found 0"),
        (10, 16, 1, r"expected at least 16 training images \(one batch\), found 10"),
    ],
)
def test_impossible_batches_are_refused(
    source: Source, size: int, batch_size: int, processes: int, message: str
) -> None:
    dataset = ImageDataset(source, np.arange(size), 8)
    with pytest.raises(ValueError, match=message):
        TrainingLoader(
            dataset, batch_size=batch_size, num_workers=0, seed=0, num_processes=processes
        )


def test_an_augmentation_to_another_size_is_a_bug(source: Source) -> None:
    with pytest.raises(AssertionError, match=r"\(32, 32, 3\)"):
        ImageDataset(source, None, 8, Augmentation(name="light", image_size=32))[0]


def mixed(count: int, fraction: float, workers: int = 0, **shard: int) -> TrainingLoader:
    """50 base images, of which 45 are used, and `count` extra ones."""
    images = np.random.default_rng(1).integers(0, 256, (50, 10, 12, 3), dtype=np.uint8)
    labels, ids = np.arange(50) % 2, np.array([f"{index}.png" for index in range(50)])
    base, extra = (
        ArraySource(images=images[:n], labels=labels[:n], class_names=["a", "b"], ids=ids[:n])
        for n in (50, count)
    )
    source = mix_sources(base, extra, fraction, None)
    chosen = np.r_[5:50, 50 : 50 + count]
    augmentation = Augmentation(name="light", image_size=8, policy="randaugment", erasing=0.25)
    dataset = ImageDataset(source, chosen, 8, augmentation, seed=1)
    return TrainingLoader(dataset, batch_size=12, num_workers=workers, seed=1, **shard)


@pytest.mark.parametrize(("count", "fraction", "share"), [(40, 0.4, 5), (3, 0.75, 9)])
def test_every_batch_has_its_share_of_extra_images(count: int, fraction: float, share: int) -> None:
    """The second set is smaller than its share of one batch."""
    loader, uses, views = mixed(count, fraction), np.zeros(50 + count, int), set[bytes]()
    pairs = set[int]()
    for epoch in range(5):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == 45 // 12
        for batch in batches:
            indices = batch["indices"].numpy()
            assert (indices >= 50).sum() == share
            shares = [(part >= 50).sum() for part in np.split(indices, 3)]
            assert max(shares) - min(shares) <= 1
            pairs |= {*(indices.reshape(-1, 2) >= 50).sum(1).tolist()}
            assert batch["labels"].tolist() == (indices % 50 % 2).tolist()
            np.add.at(uses, indices, 1)
            views |= {image.numpy().tobytes() for image in batch["images"]}
    assert pairs >= {1, 2}  # what is mixed: neither, one or both extra
    assert not uses[:5].any()
    for used in (uses[5:50], uses[50:]):
        assert used.sum() and np.ptp(used) <= 1
    assert len(views) > 0.75 * uses.sum()  # an image that comes again is augmented anew


def test_mixed_batches_do_not_depend_on_workers_processes_or_a_resume() -> None:
    loader = mixed(7, 0.5)
    whole = epochs(loader, 0, 1, 2)
    assert whole[0] != whole[1]
    resumed = mixed(7, 0.5, workers=2)
    resumed.set_epoch(1, start_step=2)
    assert bytes_of(resumed) == whole[1][2:]
    assert epochs(resumed, 2) == whole[2:]
    parts = [bytes_of(mixed(7, 0.5, process_index=k, num_processes=2)) for k in range(2)]
    for batch, first, second in zip(whole[0], *parts, strict=True):
        assert batch == tuple(one + other for one, other in zip(first, second, strict=True))


def evaluation(
    source: Source, batch_size: int = 64, workers: int = 0, **shard: int
) -> EvaluationLoader:
    dataset = ImageDataset(source, np.arange(1, 98), SIDE, skip_bad=True)
    return EvaluationLoader(dataset, batch_size=batch_size, num_workers=workers, **shard)


def test_evaluation_gives_every_image_once_in_order(source: Source) -> None:
    loader = evaluation(source, batch_size=7)
    batches = list(loader)
    assert len(batches) == len(loader) == 14
    assert torch.cat([batch["indices"] for batch in batches]).tolist() == list(range(1, 98))
    assert bytes_of(loader) == bytes_of(batches)


def test_micro_batches_have_one_shape_and_a_padded_end(source: Source) -> None:
    loader = evaluation(source)
    batches = list(micro_batches(loader))
    assert len(batches) == loader.num_micro_batches == 4
    assert [batch["count"] for batch in batches] == [32, 32, 32, 1]
    assert {tuple(batch["images"].shape) for batch in batches} == {(32, 3, SIDE, SIDE)}
    assert batches[1]["indices"].tolist() == list(range(33, 65))
    end = batches[-1]
    assert end["indices"].tolist() == [97] + [-1] * 31
    assert end["labels"][1:].unique().tolist() == [-1]
    assert end["images"][0].any() and not end["images"][1:].any()


def test_a_micro_batch_holds_as_many_pixels_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = (8, 32, 160, 224, 512)
    for on_gpu, times in ((False, 1), (True, 4)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=on_gpu: found)
        sizes = [micro_batch_size(side) for side in sides]
        assert sizes == [times * size for size in (128, 128, 62, 32, 32)]


def test_parts_are_even_and_a_power_of_two() -> None:
    numbers = (1, 128, 129, 256, 257, 304)
    sizes = [even_size(number, 128) for number in numbers]
    assert sizes == [1, 128, 65, 128, 65, 76]
    parts = [-(-number // size) for number, size in zip(numbers, sizes, strict=True)]
    assert parts == [1, 1, 2, 2, 4, 4]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 files, of which 0, 3, 31, 32 and 69 are damaged; 64 to 69 are a micro-batch alone."""
    folder = tmp_path_factory.mktemp("damaged")
    for index in range(70):
        Image.new("L", (8, 8), index).save(folder / f"{index}.png")
    for index in (0, 3, 31, 32, 69):
        (folder / f"{index}.png").write_bytes(b"x" * index)
    return folder


def everything(dataset: ImageDataset, **options: int) -> list[object]:
    loader = EvaluationLoader(dataset, **{"batch_size": 9, "num_workers": 0} | options)
    batches = list(micro_batches(loader))
    assert loader.num_micro_batches == len(batches)
    skipped = [[(bad.index, bad.message) for bad in batch["skipped"]] for batch in batches]
    counts = [batch["count"] for batch in batches]
    return list(zip(bytes_of(batches), counts, skipped, strict=True))


def test_micro_batches_depend_on_neither_batch_size_nor_workers_nor_processes(
    damaged: Path,
) -> None:
    dataset = ImageDataset(open_source("images", damaged), None, SIDE, skip_bad=True)
    expected = everything(dataset)
    assert len(expected) == 3
    for batch_size, workers in ((1, 0), (7, 2), (64, 2), (1000, 0)):
        assert everything(dataset, batch_size=batch_size, num_workers=workers) == expected
    for count in (2, 3, 5):  # each process has whole ones
        for index in range(count):
            part = everything(dataset, process_index=index, num_processes=count)
            assert part == expected[index::count]


def test_a_micro_batch_may_have_another_size(source: Source) -> None:
    dataset = ImageDataset(source, None, 8)
    shard = {"process_index": 1, "num_processes": 2}
    loader = EvaluationLoader(dataset, batch_size=9, num_workers=0, size=30, **shard)
    second, fourth = (batch["indices"].tolist() for batch in micro_batches(loader))
    assert second == list(range(30, 60))
    assert fourth == [*range(90, 100), *[-1] * 20]


def test_skipped_images_close_up_within_their_micro_batch(damaged: Path) -> None:
    dataset = ImageDataset(open_source("images", damaged), None, SIDE, skip_bad=True)
    first, second, third = micro_batches(EvaluationLoader(dataset, batch_size=7, num_workers=0))
    assert first["indices"].tolist() == [1, 2, *range(4, 31), -1, -1, -1]
    assert second["indices"].tolist() == [*range(33, 64), -1]
    assert (first["count"], second["count"], third["count"]) == (29, 31, 5)
    assert first["images"][:29, 0, 0, 0].mul(255).round().tolist() == first["indices"][:29].tolist()
    assert [bad.index for bad in first["skipped"]] == [0, 3, 31]
    assert "0.png: expected an image file, found 0 bytes." in first["skipped"][0].message


def test_a_micro_batch_may_have_no_readable_image(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").touch()
    dataset = ImageDataset(open_source("images", tmp_path), None, 8, skip_bad=True)
    (batch,) = micro_batches(EvaluationLoader(dataset, batch_size=2, num_workers=0))
    assert (batch["count"], len(batch["skipped"])) == (0, 3)
    assert batch["images"].shape == (micro_batch_size(8), 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_short_value_error(damaged: Path, workers: int) -> None:
    """No traceback of a worker in the message."""
    dataset = ImageDataset(open_source("images", damaged), None, 8)
    for loader in (
        EvaluationLoader(dataset, batch_size=16, num_workers=workers),
        TrainingLoader(dataset, batch_size=70, num_workers=workers, seed=0),
    ):
        with pytest.raises(ValueError, match=r"^\S+/\d+\.png: expected [^\n]*\.$"):
            list(loader)


def test_an_error_of_ours_in_a_worker_is_not_taken_for_a_bad_image(source: Source) -> None:
    dataset = ImageDataset(source, np.array([0, 999]), 8, skip_bad=True)
    with pytest.raises(IndexError):
        list(EvaluationLoader(dataset, batch_size=2, num_workers=1))


def test_a_dataset_of_many_files_is_small_to_hand_to_a_worker() -> None:
    from robust_submission.data.sources.folders import FileSource

    ids = np.array([f"{index}.png" for index in range(100_000)])
    dataset = ImageDataset(FileSource(folder=Path("images"), ids=ids), None, 32)
    assert len(pickle.dumps(dataset)) < 6_000_000
    assert not any(isinstance(value, list) for value in vars(dataset.source).values())


def test_the_next_batch_is_read_while_one_is_used() -> None:
    read, used = threading.Event(), list[int]()

    def batches() -> Iterator[int]:
        yield 0
        read.set()
        yield 1

    for batch in read_ahead(batches()):
        assert read.wait(timeout=30)
        used.append(batch)
    assert used == [0, 1]


def test_what_reading_raises_comes_at_its_place_and_a_stop_ends_the_thread() -> None:
    def batches() -> Iterator[int]:
        yield 0
        raise ValueError("bad")

    reading = read_ahead(batches())
    assert next(reading) == 0
    with pytest.raises(ValueError, match="bad"):
        next(reading)
    stopped = read_ahead(iter([1, 2, 3]))
    assert isinstance(stopped, Generator) and next(stopped) == 1
    stopped.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("reader")]


LEAVING = """
import multiprocessing, subprocess
from robust_submission.data.dataset import ImageDataset
from robust_submission.data.loader import TrainingLoader
from robust_submission.data.sources import open_source

dataset = ImageDataset(open_source("digits"), None, 8)
batches = iter(TrainingLoader(dataset, batch_size=16, num_workers=2, seed=0))
next(batches), next(batches)  # one from each worker: both have begun
workers = [str(worker.pid) for worker in multiprocessing.active_children()]
subprocess.run(["kill", "-TERM", *workers], check=True)
print(len(workers), sum(1 for _ in zip(range(9), batches)))
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="torch's own workers there")
def test_workers_heed_only_the_process_that_started_them() -> None:
    """A launcher's or a scheduler's SIGTERM reaches them too; what ends them is its exit."""
    command = [sys.executable, "-c", LEAVING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 9\n", "")
