"""Run all jobs on all chunks of images, over any number of processes, from where they were left.

Chunk k, a micro-batch, is for process k % P. What a job gave on a chunk stands in the journal
before the next one starts. The later parts of AutoAttack run on chunks of survivors alone: batches
stay large, and processes get alike. All processes end with all results.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from robust_submission.data.gather import gather_by_index
from robust_submission.data.loader import (
    ImageDataset,
    evaluation_loader,
    even_size,
    micro_batch_size,
    micro_batches,
)
from robust_submission.evaluation.batch import Chunk, Measure
from robust_submission.evaluation.cache import Arrays, Journal
from robust_submission.evaluation.evaluation_data import EvaluationData
from robust_submission.evaluation.plan import Job
from robust_submission.runtime import release_freed_memory

GALLERY = 8
_RELEASED_AFTER = 16  # chunks
_Part = tuple[np.ndarray, Arrays]  # rows of images, and their results
_Found = tuple[Arrays, np.ndarray]  # of all its images, and pictures of those of the gallery


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything measured; rows are images in the order of `EvaluationData.indices`."""

    clean: Arrays
    """As `Measure.clean` gives it."""
    jobs: dict[Job, Arrays]
    """As `Measure.attacked` gives it, without pictures, but with `fooled_by` int64 (n,): which of
    several parts, else -1. Of the curves the first images only."""
    gallery: list[int]
    """Rows of the images to show."""
    pictures: dict[Job, np.ndarray]
    """uint8 (len(gallery), H, W, 3), of the jobs on all images."""


@dataclass(frozen=True)
class _Clean:
    """What the attacks start from."""

    arrays: Arrays
    right: np.ndarray  # bool (n,): in any draw
    gallery: list[int]  # rows


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The work of one process."""

    accelerator: Accelerator
    measure: Measure
    data: EvaluationData
    jobs: dict[Job, bool]
    """What to do, each with whether it is for all images or for those of the curves."""
    journal: Journal
    batch_size: int
    """Images read at once."""
    num_workers: int
    """Processes that read images."""

    def run(self) -> Results:
        """Do everything that the journal does not hold yet; every process must call it."""
        total = sum(min(len(self.data.indices), self._limit(job)) for job in self.jobs)
        share = (total + len(self.data.indices)) / self.accelerator.num_processes
        hidden = not self.accelerator.is_main_process
        with tqdm(total=round(share), unit="image", smoothing=0.02, disable=hidden) as bar:
            clean = self._clean(bar)
            found = self._attack(clean, bar)
        return Results(
            clean=clean.arrays,
            jobs={job: arrays for job, (arrays, _) in found.items()},
            gallery=clean.gallery,
            pictures={job: pictures for job, (_, pictures) in found.items() if len(pictures)},
        )

    def _clean(self, bar: tqdm) -> _Clean:
        parts = list[_Part]()
        for chunk in self._chunks(np.arange(len(self.data.indices)), self._micro_batch_size):
            arrays = self.journal.load("clean", chunk.number, chunk.digest)
            if arrays is None:
                arrays = self.measure.clean(chunk)
                self.journal.save("clean", chunk.number, chunk.digest, arrays)
            parts.append((chunk.rows, arrays))
            bar.update(chunk.count)
        arrays = self._gathered(parts, range(len(self.data.indices)))
        labels = self.data.labels[self.data.indices]
        right = (arrays["predictions"] == labels[:, None]).any(axis=1)
        return _Clean(arrays, right, choose_gallery(arrays["predictions"][:, 0], labels))

    def _attack(self, clean: _Clean, bar: tqdm) -> dict[Job, _Found]:
        everyone, size = np.arange(len(clean.right)), self._micro_batch_size
        found = self._attack_with(list(self.jobs), 0, everyone, size, clean, bar)
        for job, (arrays, pictures) in found.items():
            arrays["fooled_by"] = np.where(arrays["fooled"], 0, -1)
            for part in range(1, len(job.parts)):
                self._go_on(job, part, arrays, pictures, clean, bar)
        return found

    def _go_on(
        self,
        job: Job,
        part: int,
        arrays: Arrays,
        pictures: np.ndarray,
        clean: _Clean,
        bar: tqdm,
    ) -> None:
        """A later part of a job, on those that withstood the ones before; as `WorstCase`."""
        right, gallery = clean.right[: self._limit(job)], self._shown(job, clean)
        survivors = np.flatnonzero(right & (arrays["fooled_by"] < 0))
        if len(survivors) == 0:
            return
        bar.total += round(len(survivors) / self.accelerator.num_processes)
        size = even_size(len(survivors), self._micro_batch_size)
        tried, shown = self._attack_with([job], part, survivors, size, clean, bar)[job]
        worse = tried["fooled"] | (tried["loss"] > arrays["loss"][survivors])
        for name, values in tried.items():
            arrays[name][survivors[worse]] = values[worse]
        arrays["fooled_by"][survivors[tried["fooled"]]] = part
        changed = np.isin(gallery, survivors[worse])
        pictures[changed] = shown[changed[np.isin(gallery, survivors)]]

    def _attack_with(
        self, jobs: list[Job], part: int, rows: np.ndarray, size: int, clean: _Clean, bar: tqdm
    ) -> dict[Job, _Found]:
        """One part of these jobs on the images of these rows, `size` of them a chunk."""
        parts = {job: list[_Part]() for job in jobs}
        pictures = {job: list[_Part]() for job in jobs}
        for chunk in self._chunks(rows, size):
            for job in jobs:
                mine = chunk.rows[chunk.rows < self._limit(job)]
                if len(mine) == 0:
                    continue
                bar.set_description(job.name, refresh=False)
                shown = np.flatnonzero(np.isin(mine, self._shown(job, clean)))
                arrays = self._recorded(job, part, chunk, clean.right[mine], shown)
                pictures[job].append((mine[shown], {"pictures": arrays.pop("pictures")}))
                parts[job].append((mine, arrays))
                bar.update(len(mine))
        found = dict[Job, _Found]()
        for job in jobs:
            arrays = self._gathered(parts[job], rows[rows < self._limit(job)])
            shown = self._gathered(pictures[job], np.intersect1d(rows, self._shown(job, clean)))
            found[job] = arrays, shown.get("pictures", np.zeros((0, 0, 0, 3), dtype=np.uint8))
        return found

    def _recorded(
        self, job: Job, part: int, chunk: Chunk, right: np.ndarray, shown: np.ndarray
    ) -> Arrays:
        """What a part of a job gives on a chunk, from the journal if it is there."""
        key = job.key if self.jobs[job] else f"{job.key}-curve"
        key += f"-{job.parts[part]}" if part else ""
        arrays = self.journal.load(key, chunk.number, chunk.digest)
        if arrays is None:
            arrays = self.measure.attacked(job, chunk, right, shown, part)
            self.journal.save(key, chunk.number, chunk.digest, arrays)
        return arrays

    @property
    def _micro_batch_size(self) -> int:
        return micro_batch_size(self.measure.target.image_size)

    def _limit(self, job: Job) -> int:
        """How many images, from the first on, the job is for."""
        return len(self.data.indices) if self.jobs[job] else self.data.curve_images

    def _shown(self, job: Job, clean: _Clean) -> list[int]:
        """Rows of the images whose pictures the job is to give."""
        return clean.gallery if self.jobs[job] else []

    def _chunks(self, rows: np.ndarray, size: int) -> Iterator[Chunk]:
        """This process's chunks of the images of these rows."""
        first, stride = self.accelerator.process_index, self.accelerator.num_processes
        loader = evaluation_loader(
            ImageDataset(self.data.source, self.data.indices[rows], self.measure.target.image_size),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            process_index=first,
            num_processes=stride,
            size=size,
        )
        for place, batch in enumerate(micro_batches(loader)):
            number = first + place * stride
            of_chunk = rows[number * size : (number + 1) * size]
            yield Chunk.of(number, of_chunk, batch, self.accelerator.device)
            if place % _RELEASED_AFTER == _RELEASED_AFTER - 1:
                release_freed_memory()  # attacks shrink their batches to ever other sizes

    def _gathered(self, parts: list[_Part], expected: Iterable[int]) -> Arrays:
        """The parts of all processes in the order of the rows."""
        rows = np.concatenate([rows for rows, _ in parts] or [np.zeros(0, dtype=np.int64)])
        names = parts[0][1] if parts else ()
        values = {name: np.concatenate([arrays[name] for _, arrays in parts]) for name in names}
        return gather_by_index(self.accelerator, rows, values, expected)


def choose_gallery(predictions: np.ndarray, labels: np.ndarray, count: int = GALLERY) -> list[int]:
    """Rows of up to `count` images that are right when clean: the first of each class, then others.

    Args:
        predictions: int64 (n,).
        labels: int64 (n,).
    """
    right = np.flatnonzero(predictions == labels)
    _, first = np.unique(labels[right], return_index=True)
    firsts = np.sort(right[first])
    others = np.setdiff1d(right, firsts)
    return sorted(int(row) for row in [*firsts, *others][:count])
