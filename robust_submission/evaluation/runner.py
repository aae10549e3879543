"""Runs all jobs on all chunks of images, over any number of processes.

Chunk k, a micro-batch, belongs to process k % P. The results of a job on a chunk are in the journal
before the next one starts. The later parts of AutoAttack, and all of it on a random model, run on
chunks of survivors only, so that batches stay large and processes get equal work. All processes
end with all results.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator

from robust_submission.cli.numbers import plural
from robust_submission.cli.progress import WorkBar
from robust_submission.data.corruptions import SEVERITIES
from robust_submission.data.gather import from_all_processes, gather_by_index
from robust_submission.data.loader import even_size, micro_batch_size
from robust_submission.evaluation.cache import Arrays, Journal, digest
from robust_submission.evaluation.chunks import ImageChunk
from robust_submission.evaluation.data import EvaluationData
from robust_submission.evaluation.jobs import Job, Plan
from robust_submission.evaluation.results import Results, choose_gallery
from robust_submission.runtime import release_freed_memory

_RELEASED_AFTER = 16  # chunks
_Work = tuple[int, int, Callable[[ImageChunk], Arrays]]
"""For how many images, from the first on; passes per image; what is done."""
_Part = tuple[np.ndarray, Arrays]  # rows of images, and their results
_Found = tuple[Arrays, np.ndarray]  # of all its images, and pictures of those of the gallery


class Evaluator(Protocol):
    """What is done with one chunk; see `batch.ChunkEvaluator`."""

    def clean(self, chunk: ImageChunk) -> Arrays: ...

    def corrupted(self, kind: str, chunk: ImageChunk) -> Arrays: ...

    def fixed(self, job: Job, chunk: ImageChunk) -> Arrays: ...

    def watched(self, job: Job, limit: int, chunk: ImageChunk) -> Arrays: ...

    def planted(self, job: Job, chunk: ImageChunk) -> Arrays: ...

    def attacked(
        self, job: Job, chunk: ImageChunk, right: np.ndarray, shown: np.ndarray, part: int
    ) -> Arrays: ...

    def passes(self, job: Job | None, part: int = 0) -> int: ...

    def planted_passes(self, job: Job) -> int: ...


@dataclass(kw_only=True)
class Runner:
    """The work of one process."""

    evaluator: Evaluator
    data: EvaluationData
    plan: Plan
    corruptions: Sequence[str] = ()
    """Of `CORRUPTIONS`."""
    planted: int = 0
    """In how many images, from the first on, adversarial examples are planted."""
    image_size: int
    device: torch.device
    accelerator: Accelerator | None = None
    """The processes that share the work; None for this one alone."""
    journal: Journal | None = None
    """Where results are kept; None keeps none."""
    keeps: bool = False
    """Whether the results hold the adversarial images."""
    bar: WorkBar = field(default_factory=lambda: WorkBar(hidden=True))
    """Shows the progress, in the evaluator's passes."""
    jobs: dict[Job, bool] = field(init=False)
    """The jobs to run, each with whether it is on all images or on those of the curves."""
    _labels: np.ndarray = field(init=False)
    _clean: np.ndarray = field(init=False)  # (n, draws), predictions
    _right: np.ndarray = field(init=False)  # bool (n,): correct when clean in any draw, or unknown
    _gallery: list[int] = field(init=False)  # rows
    _kept: dict[int, tuple[int, np.ndarray]] = field(init=False)  # by row: job's number and image

    def __post_init__(self) -> None:
        self.jobs = self.plan.distinct()
        self._right = np.ones(len(self.data.indices), dtype=bool)
        self._kept = {}

    def run(self) -> Results:
        """Do what the journal does not hold yet; every process must call it."""
        works = self._works()
        self._labels = labels = self.data.labels[self.data.indices]
        with self.bar.over(self.expected()):
            done = self._work(works)
            self._clean = done["clean"]["predictions"]
            right = (self._clean == labels[:, None]).any(axis=1)
            self.bar.expect(self._attacks_expected(right) - self._attacks_expected(self._right))
            self._right = right
            self._gallery = choose_gallery(self._clean[:, 0], labels)
            found = self._run_attacks()
            planted = self._run_planted()
        fixed, watched = self.plan.fixed, self.plan.watched
        sources = {job: self.plan.same_as.get(job, job) for job in self.plan.jobs}
        everywhere = [job for job in self.plan.main if self._gallery]
        return Results(
            plan=self.plan,
            labels=labels,
            curve_images=self.data.curve_images,
            clean=done["clean"],
            corrupted={kind: done[f"corrupted-{kind}"] for kind in self.corruptions},
            fixed=fixed and done[f"fixed-{fixed.label}"]["robust"],
            indicators=done[f"watched-{watched.label}"] if watched else {},
            planted=planted,
            arrays={job: found[source][0] for job, source in sources.items()},
            gallery=self._gallery,
            adversarial=self._adversarial() if self.keeps else None,
            pictures={job: found[sources[job]][1] for job in everywhere},
        )

    def summary(self) -> str:
        """What is to be run: `12 attacks on 1,000 images, 8 for curves on 100`."""
        everywhere = sum(self.jobs.values())
        found = [plural(everywhere, "attack") + f" on {plural(len(self.data.indices), 'image')}"]
        if curves := len(self.jobs) - everywhere:
            found.append(f"{curves} for curves on {self.data.curve_images}")
        if self.corruptions:
            found.append(plural(len(self.corruptions), "corruption"))
        return ", ".join(found)

    def expected(self) -> int:
        """Passes of this process, at most."""
        mine = np.flatnonzero(self._mine())
        works = sum(cost * int((mine < limit).sum()) for limit, cost, _ in self._works().values())
        if (job := self.plan.planted) is not None:
            chunks = np.arange(self.planted) // self._planted_size
            planted = int((chunks % self._num_processes == self._process_index).sum())
            works += planted * self.evaluator.planted_passes(job)
        return works + self._attacks_expected(self._right)

    def _attacks_expected(self, right: np.ndarray) -> int:
        """Passes of this process, at most, if these images are attacked."""
        rows = np.flatnonzero(right & self._mine())
        return sum(
            self.evaluator.passes(job, part) * int((rows < self._limit(job)).sum())
            for job in self.jobs
            for part in range(len(job.parts))
        )

    def _mine(self) -> np.ndarray:
        """bool (n,): the images of this process's chunks, as long as no image is left out."""
        chunks = np.arange(len(self.data.indices)) // micro_batch_size(self.image_size)
        return chunks % self._num_processes == self._process_index

    def _works(self) -> dict[str, _Work]:
        """What is done but the attacks: on the clean images, then on those of each corruption."""
        images, cost = len(self.data.indices), self.evaluator.passes(None)
        works: dict[str, _Work] = {"clean": (images, cost, self.evaluator.clean)}
        for kind in self.corruptions:
            corrupted = partial(self.evaluator.corrupted, kind)
            works[f"corrupted-{kind}"] = images, cost * len(SEVERITIES), corrupted
        if (job := self.plan.fixed) is not None:
            cost = self.evaluator.passes(job)  # but in one draw: less
            works[f"fixed-{job.label}"] = images, cost, partial(self.evaluator.fixed, job)
        if (job := self.plan.watched) is not None:
            limit, cost = self.data.curve_images, self.evaluator.passes(job)
            watched = partial(self.evaluator.watched, job, limit)
            works[f"watched-{job.label}"] = min(images, limit), cost, watched
        return works

    def _work(self, works: Mapping[str, _Work]) -> dict[str, Arrays]:
        parts = {key: list[_Part]() for key in works}
        rows = np.arange(len(self.data.indices))
        for chunk in self._chunks(rows, micro_batch_size(self.image_size)):
            for key, (limit, cost, work) in works.items():
                mine = chunk.rows[chunk.rows < limit]
                if len(mine) == 0:
                    continue
                arrays = self._recorded(key, key, chunk, cost * len(mine), partial(work, chunk))
                parts[key].append((mine, arrays))
        return {key: self._gathered(parts[key], rows[rows < works[key][0]]) for key in works}

    def _run_planted(self) -> Arrays:
        """Plant adversarial examples in the first images and look for them."""
        job, rows = self.plan.planted, np.arange(self.planted)
        if job is None or self.planted == 0:
            return {}
        key, parts, cost = f"planted-{job.label}", list[_Part](), self.evaluator.planted_passes(job)
        for chunk in self._chunks(rows, self._planted_size):
            work = partial(self.evaluator.planted, job, chunk)
            arrays = self._recorded(key, key, chunk, cost * chunk.count, work)
            parts.append((chunk.rows, arrays))
        return self._gathered(parts, rows)

    @property
    def _planted_size(self) -> int:
        return even_size(max(self.planted, 1), micro_batch_size(self.image_size))

    def _run_attacks(self) -> dict[Job, _Found]:
        rows, size = np.arange(len(self._right)), micro_batch_size(self.image_size)
        found = self._attack([job for job in self.jobs if not job.on_survivors], 0, rows, size)
        for job, (arrays, pictures) in found.items():
            rows_of_job = rows[rows < self._limit(job)]
            arrays["fooled_by"] = np.where(self._is_fooled(arrays, rows_of_job), 0, -1)
            for part in range(1, len(job.parts)):
                self._attack_survivors(job, part, arrays, pictures)
        for job in self.jobs:
            if job.on_survivors:
                found[job] = self._fooled_before(job, found)
                for part in range(len(job.parts)):
                    self._attack_survivors(job, part, *found[job])
        return found

    def _fooled_before(self, job: Job, found: dict[Job, _Found]) -> _Found:
        """What a job on survivors starts with: clean images, or what fools them in every draw."""
        arrays = {
            "predictions": self._clean.copy(),
            "distance": np.zeros(len(self._clean)),
            "fooled": np.zeros(len(self._clean), dtype=bool),
            "loss": np.where(self._right, -1.0, 0.0).astype(np.float32),  # any attack's is larger
            "fooled_by": np.full(len(self._clean), -1),
        }
        size = self.image_size
        pictures = np.zeros((len(self._gallery), size, size, 3), dtype=np.uint8)
        for other in list(self.jobs)[: list(self.jobs).index(job)]:
            if not (job.follows(other) and self.jobs[other]):
                continue
            earlier, shown = found[other]
            new = self._withstood(arrays) & ~self._withstood(earlier)
            for name in ("predictions", "distance", "loss"):
                arrays[name][new] = earlier[name][new]
            arrays["fooled_by"][new] = len(job.parts)
            pictures[new[self._gallery]] = shown[new[self._gallery]]
        return arrays, pictures

    def _withstood(self, arrays: Arrays) -> np.ndarray:
        """bool (n,): images that are right when clean, and after an attack in any draw."""
        rows = len(arrays["predictions"])
        right = arrays["predictions"] == self._labels[:rows, None]
        return self._right[:rows] & right.any(axis=1)

    def _is_fooled(self, arrays: Arrays, rows: np.ndarray) -> np.ndarray:
        """bool (m,): what fools by the attack's own test and, in one draw, as it is scored too.

        The two are in batches of different sizes, whose rounding may differ.
        """
        predictions = arrays["predictions"]
        if predictions.shape[1] > 1:
            return arrays["fooled"]
        return arrays["fooled"] & (predictions[:, 0] != self._labels[rows])

    def _attack_survivors(self, job: Job, part: int, arrays: Arrays, pictures: np.ndarray) -> None:
        """Run a later part of a job on the images that withstood those before; as `WorstCase`."""
        right, gallery = self._right[: self._limit(job)], self._shown(job)
        before = arrays["fooled_by"] >= 0
        survivors = np.flatnonzero(self._withstood(arrays) if job.on_survivors else right & ~before)
        before = before[survivors]
        size = even_size(max(len(survivors), 1), micro_batch_size(self.image_size))
        mine = np.arange(len(survivors)) // size % self._num_processes == self._process_index
        planned = right & self._mine()[: len(right)]
        self.bar.expect(self.evaluator.passes(job, part) * int(mine.sum() - planned.sum()))
        if len(survivors) == 0:
            return
        tried, shown = self._attack([job], part, survivors, size)[job]
        fooled = self._is_fooled(tried, survivors)
        worse = tried["loss"] > arrays["loss"][survivors]
        worse = (fooled & ~before) | ((fooled == before) & worse)
        for name, values in tried.items():
            arrays[name][survivors[worse]] = values[worse]
        arrays["fooled_by"][survivors[fooled & ~before]] = part
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
                right, shown = self._right[mine], np.flatnonzero(np.isin(mine, self._shown(job)))
                expected = self.evaluator.passes(job, part) * int(right.sum())
                work = partial(self.evaluator.attacked, job, chunk, right, shown, part)
                arrays = self._recorded(self._key(job, part), job.name, chunk, expected, work)
                pictures[job].append((mine[shown], {"pictures": arrays.pop("pictures")}))
                fooling = mine[right & (arrays["predictions"][:, 0] != self._labels[mine])]
                self._keep(job, fooling, arrays.pop("images", ()))
                parts[job].append((mine, arrays))
        found = dict[Job, _Found]()
        for job in jobs:
            arrays = self._gathered(parts[job], rows[rows < self._limit(job)])
            shown = self._gathered(pictures[job], np.intersect1d(rows, self._shown(job)))
            found[job] = arrays, shown.get("pictures", np.zeros((0, 0, 0, 3), dtype=np.uint8))
        return found

    def _keep(self, job: Job, rows: np.ndarray, images: Iterable[np.ndarray]) -> None:
        """Keep what fools the model, of each image what the first job makes of it."""
        number = list(self.jobs).index(job)
        for row, image in zip(rows.tolist(), images, strict=False):
            if row not in self._kept or number < self._kept[row][0]:
                self._kept[row] = number, image

    def _adversarial(self) -> np.ndarray | None:
        """The images, with what all processes kept of them; in the main process."""
        kept = from_all_processes(self.accelerator, [*self._kept.items()])
        if self._process_index:
            return None
        rows = np.arange(len(self.data.indices))
        (batch,) = self.data.micro_batches(rows, self.image_size, len(rows), 0, 1)
        found = batch["images"].numpy()
        for row, (_, image) in sorted(kept, key=lambda one: one[1][0], reverse=True):
            found[row] = image
        return found

    def _key(self, job: Job, part: int) -> str:
        """What the journal calls a part of a job."""
        key = job.key if self.jobs[job] else f"{job.key}-curve"
        return f"{key}-{job.parts[part]}" if part else key

    def _recorded(
        self, key: str, name: str, chunk: ImageChunk, expected: int, work: Callable[[], Arrays]
    ) -> Arrays:
        """The results of a work on a chunk, from the journal if they are there."""
        self.bar.name(name)
        arrays = self.journal and self.journal.load(key, chunk.number, chunk.digest)
        if arrays is not None:
            self.bar.skip(expected)
            return arrays
        with self.bar.part(expected):
            arrays = work()
        if self.journal is not None:
            self.journal.save(key, chunk.number, chunk.digest, arrays)
        return arrays

    @property
    def _num_processes(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    @property
    def _process_index(self) -> int:
        return self.accelerator.process_index if self.accelerator else 0

    def _limit(self, job: Job) -> int:
        """The number of images, from the first on, that the job is for."""
        return len(self.data.indices) if self.jobs[job] else self.data.curve_images

    def _shown(self, job: Job) -> list[int]:
        """Rows of the images whose pictures the job returns."""
        return self._gallery if self.jobs[job] else []

    def _chunks(self, rows: np.ndarray, size: int) -> Iterator[ImageChunk]:
        """This process's chunks of the images of these rows."""
        first, stride = self._process_index, self._num_processes
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
