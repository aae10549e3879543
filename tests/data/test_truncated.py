"""Truncated files are read as far as they go; files damaged in another way are not."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from robust_submission.cli.errors import UserError
from robust_submission.data.sources import open_source
from robust_submission.data.truncated import TruncatedSource

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP"])
def test_what_is_there_of_a_truncated_file_is_read(
    tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
):
    encoded = io.BytesIO()
    Image.fromarray(PIXELS).save(encoded, format)
    content = encoded.getvalue()
    whole = np.array(Image.open(encoded).convert("RGB"))
    (tmp_path / "0.png").write_bytes(content)
    (tmp_path / "1.png").write_bytes(content[: len(content) * 3 // 4])
    (tmp_path / "2.png").write_bytes(b"not an image")
    source = TruncatedSource(open_source("images", tmp_path))
    assert np.array_equal(source.image(0), whole) and not caplog.records
    with pytest.raises(UserError, match=r"1\.png: expected a whole image, found it truncated"):
        source.source.image(1)
    with caplog.at_level(logging.WARNING, "robust_submission"):
        image = source.image(1)
    assert caplog.messages == ["truncated, read as far as it goes: 1.png"]
    there = slice(-15, None) if format == "BMP" else slice(15)  # BMP begins at the bottom
    assert image.shape == whole.shape and np.array_equal(image[there], whole[there])
    assert not np.array_equal(image, whole)
    with pytest.raises(UserError, match=r"2\.png: expected an image"):
        source.image(2)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(UserError):
        source.source.image(1)
