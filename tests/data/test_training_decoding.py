"""Decoding for training: JPEG files are reduced where that is not seen."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from robust_submission.data.augment import Augmentation, resample
from robust_submission.data.images import decode_image
from robust_submission.data.sources import MixedSource
from robust_submission.data.sources.source import FileSource

PHOTO = Image.fromarray(load_sample_image("china.jpg")).resize((161, 97))
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"


def jpeg(image: Image.Image = PHOTO, **options: Any) -> bytes:
    image.save(file := io.BytesIO(), "JPEG", **options)
    return file.getvalue()


def test_a_file_is_reduced_as_far_as_its_sides_allow() -> None:
    sides = [decode_image(jpeg(), "a.jpg", least_side=least).shape[0] for least in (12, 13, 48, 49)]
    assert sides == [13, 25, 49, 97]
    assert decode_image(jpeg(exif=TURNED), "a.jpg", least_side=48).shape == (81, 49, 3)
    PHOTO.save(png := io.BytesIO(), "PNG")
    assert np.array_equal(decode_image(png.getvalue(), "a.png", least_side=1), np.asarray(PHOTO))


@pytest.mark.parametrize("name", ["none", "light", "challenge", "imagenet"])
def test_a_reduced_image_differs_less_than_by_another_filter(name: str) -> None:
    least = Augmentation(name=name, image_size=32).least_side
    square = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 427, 427))
    content = jpeg(square.resize((2 * least, 2 * least), Image.Resampling.BICUBIC))
    whole, reduced = (decode_image(content, "a.jpg", least_side=each) for each in (None, least))
    assert reduced.shape == (least, least, 3)
    exact, found = (resample(each, 32, 32).astype(int) for each in (whole, reduced))
    other = Image.fromarray(whole).resize((32, 32), Image.Resampling.LANCZOS)
    assert 0 < np.abs(found - exact).mean() < np.abs(np.asarray(other) - exact).mean()


def test_sources_pass_it_on(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    one = FileSource(
        folder=tmp_path, ids=np.array(["a.jpg"]), labels=np.zeros(1, int), class_names=["a"]
    )
    both = MixedSource(ids=np.array(["a", "b"]), base=one, extra=one, fraction=0.5, least_side=40)
    assert both.image(0).shape == both.image(1).shape == (49, 81, 3)
    assert one.image(0).shape == (97, 161, 3)
