"""The images that are evaluated, with the labels of the model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robust_submission.evaluation.data import TensorSource, open_evaluation_data
from robust_submission.settings import DataOptions
from tests.evaluation.test_views import IMAGES


def test_images_reach_the_model_with_its_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for level, name in enumerate(("Ship", "bird")):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2), 255 * level).save(tmp_path / name / "0.png")
    options = DataOptions(name="folder", root=tmp_path)
    data = open_evaluation_data(options, None, None, None, seed=0).matched_to(
        ["bird", "cat", "ship"]
    )
    assert data.class_names == ["bird", "cat", "ship"] and data.labels.tolist() == [2, 0]
    (batch,) = data.micro_batches(np.arange(2), 2, 2, 0, 1)
    assert batch["labels"].tolist() == [2 - 2 * int(each.mean()) for each in batch["images"]]
    assert caplog.messages == [
        f"folder in {tmp_path}: 2 classes matched by name with the model's 3."
    ]
    assert data.matched_to(None) is data
    data.require_classes_of(None, "twin")
    data.require_classes_of(["bird", "cat", "ship"], "twin")
    for others in (["ship", "cat", "bird"], ["bird", "cat", "ship", "car"]):
        with pytest.raises(ValueError, match="twin: expected the 3 classes of the evaluated model"):
            data.require_classes_of(others, "twin")
    with pytest.raises(ValueError, match="it does not know ship"):
        data.matched_to(["bird", "cat"])
    options = replace(options, labels="indices")
    data = open_evaluation_data(options, None, None, None, seed=0)
    for known in (["cat", "dog"], ["cat", "dog", "emu"]):
        matched = data.matched_to(known)
        assert matched.class_names == known and matched.labels.tolist() == [0, 1]
    assert data.matched_to(["cat"]) is data  # which no model of one class passes
    assert data.numbered(2) is data and data.numbered(3).class_names == ["0", "1", "2"]


def test_tensors_are_matched_too() -> None:
    source = TensorSource(IMAGES, [0, 1, 1, 0])
    source.name_classes(["b", "A"], ["a", "b", "c"])
    assert source.labels.tolist() == [1, 0, 0, 1] and source.class_names == ["a", "b", "c"]
