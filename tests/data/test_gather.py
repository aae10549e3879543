"""Each image once, in order, from one process and from two."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_submission.data.dataset import Skipped
from robust_submission.data.gather import gather_by_index, gather_skipped
from tests.conftest import run_command


def test_one_process_sorts_by_index() -> None:
    indices = torch.tensor([5, 2, 9])
    values = {"logits": torch.tensor([[5.0], [2.0], [9.0]]), "labels": np.array([50, 20, 90])}
    gathered = gather_by_index(None, indices, values, expected=[9, 2, 5])
    assert gathered["logits"].tolist() == [[2], [5], [9]]
    assert gathered["labels"].tolist() == [20, 50, 90]


def test_half_precision_and_gradients_come_through() -> None:
    values = {
        "half": torch.ones(1, dtype=torch.float16),
        "bfloat": torch.full((1,), 0.5, dtype=torch.bfloat16),
        "grad": torch.ones(1, requires_grad=True),
    }
    gathered = gather_by_index(None, np.array([0]), values, expected=[0])
    assert [gathered[name].item() for name in values] == [1, 0.5, 1]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1], r"each of 3 images, found 1 lost \(2\)"),
        ([0, 1, 2, 1], r"found 1 doubled \(1\)"),
        ([0, 1, 1], r"found 1 lost \(2\); 1 doubled \(1\)"),
        ([0, 1, 2, 7], r"found 1 foreign \(7\)"),
        ([], r"found 3 lost \(0, 1, 2\)"),
        ([*range(10, 20)], r"10 foreign \(10, 11, 12, 13, 14, …\)"),
    ],
)
def test_lost_doubled_and_foreign_images_are_noticed(indices: list[int], message: str) -> None:
    mine = np.array(indices, dtype=np.int64)
    with pytest.raises(RuntimeError, match=message):
        gather_by_index(None, mine, {"a": mine}, expected=range(3))


def test_values_need_one_row_for_each_index() -> None:
    with pytest.raises(RuntimeError, match=r"expected 2 rows of each result, found \{'a': 3\}"):
        gather_by_index(None, np.arange(2), {"a": np.zeros(3)}, expected=range(2))


def test_nothing_expected_and_nothing_given() -> None:
    nothing = np.empty(0, dtype=np.int64)
    gathered = gather_by_index(None, nothing, {"a": np.empty((0, 4))}, expected=[])
    assert gathered["a"].shape == (0, 4)


def test_skipped_images_are_in_order() -> None:
    skipped = [Skipped(7, "seven", 0), Skipped(3, "three", 5)]
    assert list(gather_skipped(None, skipped).items()) == [(3, "three"), (7, "seven")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """260 images, three micro-batches: two processes get 132 and 128 of them; two are damaged."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (260, 8, 8, 3), dtype=np.uint8)
    for index in range(260):
        Image.fromarray(pixels[index]).save(folder / f"{index}.png")
    for index in (5, 140):
        (folder / f"{index}.png").write_text("damaged")
    return folder


def run(images: Path, out: Path, processes: int) -> list[dict[str, np.ndarray]]:
    """What each process wrote."""
    script, cpu = Path(__file__).with_name("two_processes.py"), {"ACCELERATE_USE_CPU": "true"}
    done = run_command(script, images, out, processes=processes, environment=cpu)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [out / f"{rank}_of_{processes}.npz" for rank in range(processes)]
    return [dict(np.load(file)) for file in files]


def test_two_processes_give_what_one_gives(images: Path, tmp_path: Path) -> None:
    first, second = run(images, tmp_path, 2)
    good = [index for index in range(260) if index not in (5, 140)]
    pixels = np.stack([np.asarray(Image.open(images / f"{index}.png")) for index in good])
    sums = (pixels / np.float32(255)).sum(axis=(1, 2), dtype=np.float64)
    for results in (first, second):
        assert np.array_equal(results["sums"], sums)
        assert results["skipped"].tolist() == [5, 140]
        assert "140.png: expected an image" in str(results["messages"][1])
        assert results["one_sided"].tolist() == [0, 1, 4, 9, 16]
        assert "1 doubled (2)" in str(results["doubled"])
        assert "1 lost (1)" in str(results["lost"])
        assert "expected 2 rows of each result, found {'a': 1}" in str(results["rows"])
