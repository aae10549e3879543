"""Training images together with extra ones, such as generated images."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from robust_submission.data.sources.names import match_classes
from robust_submission.data.sources.source import StoredSource


@dataclass(frozen=True, eq=False, kw_only=True)
class MixedSource(StoredSource):
    """The images of `base`, then those of `extra`: an index is an image's own, as its seeds are."""

    base: StoredSource
    extra: StoredSource
    fraction: float
    """The share of extra images in each batch, from 0 to 1."""

    def _part(self, index: int) -> tuple[StoredSource, int]:
        extra = index - len(self.base)
        return (self.base, index) if extra < 0 else (self.extra, extra)

    def content(self, index: int) -> bytes:
        source, own = self._part(index)
        return source.content(own)

    def place(self, index: int) -> str:
        source, own = self._part(index)
        return source.place(own)

    def stamp(self, index: int) -> bytes:
        source, own = self._part(index)
        return source.stamp(own)

    def image(self, index: int) -> np.ndarray:
        source, own = self._part(index)
        return replace(source, least_side=self.least_side).image(own)


def mix_sources(
    base: StoredSource, extra: StoredSource, fraction: float, place: Path | None
) -> MixedSource:
    """Both, with the classes of `base`; messages call the extra images `place`.

    Both have labels.

    Raises:
        UserError: the extra images have a class that `base` has not.
    """
    assert base.labels is not None and base.class_names is not None
    assert extra.labels is not None and extra.class_names is not None
    labels, _ = match_classes(extra.labels, extra.class_names, base.class_names, place)
    return MixedSource(
        ids=np.concatenate([base.ids, np.char.add("extra/", extra.ids)]),
        labels=np.concatenate([base.labels, labels]),
        class_names=base.class_names,
        base=base,
        extra=extra,
        fraction=fraction,
    )
