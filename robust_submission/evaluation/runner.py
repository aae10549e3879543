"""Runs all jobs on all chunks of images, over any number of processes.

Chunk k, a micro-batch, belongs to process k % P. The results of a job on a chunk are in the journal
before the next one starts. The later parts of AutoAttack run on chunks of survivors only, so that
batches stay large and processes get equal work. All processes end with all results.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from robust_submission.data.gather import gather_by_index
from robust_submission.data.loader import even_size, micro_batch_size
from robust_submission.evaluation.cache import Arrays, Journal, digest
from robust_submission.evaluation.chunks import ImageChunk
from robust_submission.evaluation.data import EvaluationData
from robust_submission.evaluation.jobs import Job, Plan
from robust_submission.evaluation.results import Results, choose_gallery
from robust_submission.runtime import release_freed_memory

_RELEASED_AFTER = 16  # chunks
_Part = tuple[np.ndarray, Arrays]  # rows of images, and their results
_Found = tuple[Arrays, np.ndarray]  # of all its images, and pictures of those of the gallery


class Evaluator(Protocol):
    """What is done with one chunk; see `batch.ChunkEvaluator`."""

    def clean(self, chunk: ImageChunk) -> Arrays: ...

    def corrupted(self, kind: str, chunk: ImageChunk) -> Arrays: ...

    def attacked(
        self, job: Job, chunk: ImageChunk, right: np.ndarray, shown: np.ndarray, part: int
    ) -> Arrays: ...


@dataclass(kw_only=True)
class Runner:
    """The work of one process."""

    evaluator: Evaluator
    data: EvaluationData
    plan: Plan
    corruptions: Sequence[str] = ()
    """Of `CORRUPTIONS`."""
    image_size: int
    device: torch.device
    accelerator: Accelerator | None = None
    """The processes that share the work; None for this one alone."""
    journal: Journal | None = None
    """Where results are kept; None keeps none."""
    jobs: dict[Job, bool] = field(init=False)
    """The jobs to run, each with whether it is on all images or on those of the curves."""
    _bar: tqdm = field(init=False)
    _right: np.ndarray = field(init=False)  # bool (n,): correct when clean, in any draw
    _gallery: list[int] = field(init=False)  # rows

    def __post_init__(self) -> None:
        self.jobs = self.plan.distinct()

    def run(self) -> Results:
        """Do what the journal does not hold yet; every process must call it."""
        images = len(self.data.indices)
        total = images * (1 + len(self.corruptions))
        total += sum(min(images, self._limit(job)) for job in self.jobs)
        hidden = self.accelerator is not None and not self.accelerator.is_main_process
        share = round(total / self._num_processes)
        labels = self.data.labels[self.data.indices]
        with tqdm(total=share, unit="image", smoothing=0.02, disable=hidden) as self._bar:
            clean, *corrupted = self._predict()
            self._right = (clean["predictions"] == labels[:, None]).any(axis=1)
            self._gallery = choose_gallery(clean["predictions"][:, 0], labels)
            found = self._run_attacks()
        sources = {job: self.plan.same_as.get(job, job) for job in self.plan.jobs}
        everywhere = [job for job in self.plan.main if self._gallery]
        return Results(
            plan=self.plan,
            labels=labels,
            curve_images=self.data.curve_images,
            clean=clean,
            corrupted={
                kind: arrays["predictions"]
                for kind, arrays in zip(self.corruptions, corrupted, strict=True)
            },
            arrays={job: found[source][0] for job, source in sources.items()},
            gallery=self._gallery,
            pictures={job: found[sources[job]][1] for job in everywhere},
        )

    def _predict(self) -> list[Arrays]:
        """Predict without an attack: the clean images, then those of each corruption."""
        works: dict[str, Callable[[ImageChunk], Arrays]] = {"clean": self.evaluator.clean}
        for kind in self.corruptions:
            works[f"corrupted-{kind}"] = partial(self.evaluator.corrupted, kind)
        parts = {key: list[_Part]() for key in works}
        rows = np.arange(len(self.data.indices))
        for chunk in self._chunks(rows, micro_batch_size(self.image_size)):
            for key, work in works.items():
                self._bar.set_description(key, refresh=False)
                arrays = self._load(key, chunk)
                if arrays is None:
                    arrays = work(chunk)
                    self._save(key, chunk, arrays)
                parts[key].append((chunk.rows, arrays))
                self._bar.update(chunk.count)
        return [self._gathered(each, rows) for each in parts.values()]

    def _run_attacks(self) -> dict[Job, _Found]:
        rows, size = np.arange(len(self._right)), micro_batch_size(self.image_size)
        found = self._attack(list(self.jobs), 0, rows, size)
        for job, (arrays, pictures) in found.items():
            arrays["fooled_by"] = np.where(arrays["fooled"], 0, -1)
            for part in range(1, len(job.parts)):
                self._attack_survivors(job, part, arrays, pictures)
        return found

    def _attack_survivors(self, job: Job, part: int, arrays: Arrays, pictures: np.ndarray) -> None:
        """Run a later part of a job on the images that withstood those before; as `WorstCase`."""
        right, gallery = self._right[: self._limit(job)], self._shown(job)
        survivors = np.flatnonzero(right & (arrays["fooled_by"] < 0))
        if len(survivors) == 0:
            return
        self._bar.total += round(len(survivors) / self._num_processes)
        size = even_size(len(survivors), micro_batch_size(self.image_size))
        tried, shown = self._attack([job], part, survivors, size)[job]
        worse = tried["fooled"] | (tried["loss"] > arrays["loss"][survivors])
        for name, values in tried.items():
            arrays[name][survivors[worse]] = values[worse]
        arrays["fooled_by"][survivors[tried["fooled"]]] = part
        changed = np.isin(gallery, survivors[worse])
        pictures[changed] = shown[changed[np.isin(gallery, survivors)]]

    def _attack(self, jobs: list[Job], part: int, rows: np.ndarray, size: int) -> dict[Job, _Found]:
        """Run one part of these jobs on the images of these rows, in chunks of `size`."""
        parts = {job: list[_Part]() for job in jobs}
        pictures = {job: list[_Part]() for job in jobs}
        for chunk in self._chunks(rows, size):
            for job in jobs:
                mine = chunk.rows[chunk.rows < self._limit(job)]
                if len(mine) == 0:
                    continue
                self._bar.set_description(job.name, refresh=False)
                shown = np.flatnonzero(np.isin(mine, self._shown(job)))
                arrays = self._recorded(job, part, chunk, self._right[mine], shown)
                pictures[job].append((mine[shown], {"pictures": arrays.pop("pictures")}))
                parts[job].append((mine, arrays))
                self._bar.update(len(mine))
        found = dict[Job, _Found]()
        for job in jobs:
            arrays = self._gathered(parts[job], rows[rows < self._limit(job)])
            shown = self._gathered(pictures[job], np.intersect1d(rows, self._shown(job)))
            found[job] = arrays, shown.get("pictures", np.zeros((0, 0, 0, 3), dtype=np.uint8))
        return found

    def _recorded(
        self, job: Job, part: int, chunk: ImageChunk, right: np.ndarray, shown: np.ndarray
    ) -> Arrays:
        """The results of a part of a job on a chunk, from the journal if they are there."""
        key = job.key if self.jobs[job] else f"{job.key}-curve"
        key += f"-{job.parts[part]}" if part else ""
        arrays = self._load(key, chunk)
        if arrays is None:
            arrays = self.evaluator.attacked(job, chunk, right, shown, part)
            self._save(key, chunk, arrays)
        return arrays

    def _load(self, key: str, chunk: ImageChunk) -> Arrays | None:
        return self.journal and self.journal.load(key, chunk.number, chunk.digest)

    def _save(self, key: str, chunk: ImageChunk, arrays: Arrays) -> None:
        if self.journal is not None:
            self.journal.save(key, chunk.number, chunk.digest, arrays)

    @property
    def _num_processes(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    def _limit(self, job: Job) -> int:
        """The number of images, from the first on, that the job is for."""
        return len(self.data.indices) if self.jobs[job] else self.data.curve_images

    def _shown(self, job: Job) -> list[int]:
        """Rows of the images whose pictures the job returns."""
        return self._gallery if self.jobs[job] else []

    def _chunks(self, rows: np.ndarray, size: int) -> Iterator[ImageChunk]:
        """This process's chunks of the images of these rows."""
        first = self.accelerator.process_index if self.accelerator else 0
        stride = self._num_processes
        batches = self.data.micro_batches(rows, self.image_size, size, first, stride)
        for place, batch in enumerate(batches):
            number = first + place * stride
            pixels, labels = batch["images"].numpy(), batch["labels"].numpy()
            yield ImageChunk(
                number=number,
                rows=rows[number * size : (number + 1) * size],
                images=batch["images"].to(self.device),
                labels=batch["labels"].to(self.device),
                indices=batch["indices"][: batch["count"]].numpy(),
                digest=digest([pixels.tobytes(), labels.tobytes()]),
            )
            if place % _RELEASED_AFTER == _RELEASED_AFTER - 1:
                release_freed_memory()  # attacks shrink their batches to ever other sizes

    def _gathered(self, parts: list[_Part], expected: Iterable[int]) -> Arrays:
        """The parts of all processes in the order of the rows."""
        rows = np.concatenate([rows for rows, _ in parts] or [np.zeros(0, dtype=np.int64)])
        names = parts[0][1] if parts else ()
        values = {name: np.concatenate([arrays[name] for _, arrays in parts]) for name in names}
        return gather_by_index(self.accelerator, rows, values, expected)
