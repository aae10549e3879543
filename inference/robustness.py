"""Run all jobs on all chunks of images, over any number of processes, from where they were left.

Chunk k, a micro-batch, is for process k % P. What a job gave on a chunk stands in the journal
before the next one starts. All processes end with all results.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from data.gather import gather_by_index
from data.loader import ImageDataset, evaluation_loader, micro_batches
from inference.evaluation_data import EvaluationData
from inference.jobs import Job
from inference.journal import Arrays, Journal
from inference.measure import Chunk, Measure

GALLERY = 8
_Part = tuple[np.ndarray, Arrays]  # rows of images, and their results


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything measured; rows are images in the order of `EvaluationData.indices`."""

    clean: Arrays
    """As `Measure.clean` gives it."""
    jobs: dict[Job, Arrays]
    """As `Measure.attacked` gives it, without pictures; of the curves the first images only."""
    gallery: list[int]
    """Rows of the images to show."""
    pictures: dict[Job, np.ndarray]
    """uint8 (len(gallery), H, W, 3), of the jobs on all images."""


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
        total = sum(min(len(self.data.indices), self._limit(all_)) for all_ in self.jobs.values())
        share = (total + len(self.data.indices)) / self.accelerator.num_processes
        hidden = not self.accelerator.is_main_process
        with tqdm(total=round(share), unit="image", smoothing=0.02, disable=hidden) as bar:
            clean = self._clean(bar)
            labels = self.data.labels[self.data.indices]
            right = (clean["predictions"] == labels[:, None]).any(axis=1)
            gallery = choose_gallery(clean["predictions"][:, 0], labels)
            rows, shown = self._attack(right, gallery, bar)
        return Results(
            clean=clean,
            jobs={
                job: self._gathered(rows[job], range(self._limit(all_)))
                for job, all_ in self.jobs.items()
            },
            gallery=gallery,
            pictures={
                job: self._gathered(shown[job], gallery)["pictures"]
                for job, all_ in self.jobs.items()
                if all_ and gallery
            },
        )

    def _clean(self, bar: tqdm) -> Arrays:
        parts = list[_Part]()
        for chunk in self._chunks():
            arrays = self.journal.load("clean", chunk.number, chunk.digest)
            if arrays is None:
                arrays = self.measure.clean(chunk)
                self.journal.save("clean", chunk.number, chunk.digest, arrays)
            parts.append((chunk.rows, arrays))
            bar.update(chunk.count)
        return self._gathered(parts, range(len(self.data.indices)))

    def _attack(
        self, right: np.ndarray, gallery: list[int], bar: tqdm
    ) -> tuple[dict[Job, list[_Part]], dict[Job, list[_Part]]]:
        """Results by image, and pictures by image of the gallery."""
        results = {job: list[_Part]() for job in self.jobs}
        pictures = {job: list[_Part]() for job in self.jobs}
        for chunk in self._chunks():
            for job, all_ in self.jobs.items():
                rows = chunk.rows[chunk.rows < self._limit(all_)]
                if len(rows) == 0:
                    continue
                bar.set_description(job.name, refresh=False)
                shown = np.array([row for row in gallery if all_ and row in rows], dtype=np.int64)
                key = job.key if all_ else f"{job.key}-curve"
                arrays = self.journal.load(key, chunk.number, chunk.digest)
                if arrays is None:
                    arrays = self.measure.attacked(job, chunk, right[rows], shown - rows[0])
                    self.journal.save(key, chunk.number, chunk.digest, arrays)
                pictures[job].append((shown, {"pictures": arrays.pop("pictures")}))
                results[job].append((rows, arrays))
                bar.update(len(rows))
        return results, pictures

    def _limit(self, all_images: bool) -> int:
        return len(self.data.indices) if all_images else self.data.curve_images

    def _chunks(self) -> Iterator[Chunk]:
        """This process's chunks."""
        first, stride = self.accelerator.process_index, self.accelerator.num_processes
        size = self.measure.target.image_size
        loader = evaluation_loader(
            ImageDataset(self.data.source, self.data.indices, size),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            process_index=first,
            num_processes=stride,
        )
        for place, batch in enumerate(micro_batches(loader)):
            yield Chunk.of(first + place * stride, batch, self.accelerator.device)

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
