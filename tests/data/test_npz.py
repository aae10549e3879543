"""Images in npz files: stored and compressed alike, and every fault."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from robust_submission.data.sources import open_source

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 50, 50, 3), dtype=np.uint8)
LABELS = np.arange(40) % 4


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_both_kinds_give_the_images(
    tmp_path: Path, save: Callable[..., None], fortran: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images = np.asfortranarray(IMAGES) if fortran else IMAGES
    save(tmp_path / "a.npz", image=images, label=LABELS.astype(np.uint8))
    source = open_source("npz", tmp_path / "a.npz")
    mapped = save is np.savez and not fortran
    assert [message.split(", ")[1][:20] for message in caplog.messages] == (
        [] if mapped else ["and therefore loaded"]
    )
    handed = pickle.dumps(source)  # as to a worker
    assert (len(handed) < IMAGES.nbytes / 2) == mapped
    again = pickle.loads(handed)
    for index in range(40):
        assert np.array_equal(again.image(index), IMAGES[index])
    assert source.class_names == ["0", "1", "2", "3"]
    assert source.labels is not None and source.labels.tolist() == LABELS.tolist()
    save(tmp_path / "b.npz", image=IMAGES[::-1], label=LABELS)
    assert source.stamp(0) != open_source("npz", tmp_path / "b.npz").stamp(0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": IMAGES.astype(object), "label": LABELS}, r"\(N, H, W, 3\), found object \(40"),
        ({"image": IMAGES, "label": LABELS.astype(object)}, r"label to be integers \(40,\), .*obj"),
        ({"image": IMAGES[..., 0], "label": LABELS}, r"H, W, 3\), found uint8 \(40, 50, 50\)"),
        ({"image": IMAGES / 255, "label": LABELS}, r"uint8 \(N, H, W, 3\), found float64"),
        ({"image": IMAGES, "label": LABELS[:39]}, r"integers \(40,\), .* found int64 \(39,\)"),
        ({"image": IMAGES, "label": LABELS - 1}, "labels from 0 to 999999, found -1"),
        ({"image": IMAGES, "label": LABELS + 10**9}, "labels from 0 to 999999, found 10000000"),
    ],
)
def test_other_arrays_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{path}: expected .*{message}"):
        open_source("npz", path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "a.npz"
    save(path, image=IMAGES, label=LABELS)
    whole = path.read_bytes()
    for content in (whole[:1000], whole[1000:], b"", b"no zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: expected a whole npz file, found"):
            open_source("npz", path)
    with pytest.raises(ValueError, match="expected an npz file, found nothing there"):
        open_source("npz", tmp_path / "b.npz")
