"""Image files that lack their end, read as far as they go."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ImageFile

from robust_submission.cli.errors import UserError, log
from robust_submission.data.sources import Source


@contextmanager
def _truncated_files_load() -> Iterator[None]:
    """Pillow's switch, which is the whole process's: no other thread may decode meanwhile."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


class TruncatedSource:
    """A source whose truncated files are read: what they lack is grey or black, with a warning.

    Files that are damaged in another way raise a UserError, as in `source`.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.ids, self.labels, self.class_names = source.ids, source.labels, source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (H, W, 3), RGB."""
        try:
            return self.source.image(index)
        except UserError as error:
            if "truncated" not in str(error.__cause__):
                raise
            with _truncated_files_load():
                image = self.source.image(index)
            log.warning("truncated, read as far as it goes: %s", self.ids[index])
            return image
