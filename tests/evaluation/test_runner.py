"""The parts of a job: which images are attacked with which, in what chunks, and what is kept."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from robust_submission.data.sources.arrays import ArraySource
from robust_submission.evaluation.cache import Arrays, Journal
from robust_submission.evaluation.checks.comparisons import compare_attackers
from robust_submission.evaluation.chunks import ImageChunk
from robust_submission.evaluation.data import EvaluationData
from robust_submission.evaluation.jobs import Attacker, Job, Plan
from robust_submission.evaluation.runner import Runner

NUMBER, LIMIT = 300, 20  # images; of the curves
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, NUMBER)
INDICES = np.sort(RNG.permutation(2 * NUMBER)[:NUMBER])
RIGHT = INDICES % 7 != 0
FOOLED_BY = np.where(RIGHT & (INDICES % 5 < 4), INDICES % 5, -1)
LOSS = (0.0, 1.0, 3.0, 2.0)  # that each part reaches, whether it fools or not
AUTOATTACK = Job(attack="autoattack", attacker=Attacker.OBLIVIOUS, norm="linf", epsilon=0.1)
PGD = Job(attack="pgd", attacker=Attacker.OBLIVIOUS, norm="linf", epsilon=0.1, steps=2)


class Attacked:
    """A ChunkEvaluator whose part k fools the images with index % 5 == k."""

    def __init__(self) -> None:
        self.calls = list[tuple[Job, int, ImageChunk]]()
        self.corruptions = list[str]()

    def clean(self, chunk: ImageChunk) -> Arrays:
        labels = chunk.labels[: chunk.count].numpy()
        return {"predictions": np.where(chunk.indices % 7 == 0, 9, labels)[:, None]}

    def fixed(self, job: Job, chunk: ImageChunk) -> Arrays:
        return {"robust": chunk.indices % 3 > 0}

    def watched(self, job: Job, limit: int, chunk: ImageChunk) -> Arrays:
        return {"cosine": chunk.indices[chunk.rows < limit].astype(float)}

    def corrupted(self, kind: str, chunk: ImageChunk) -> Arrays:
        self.corruptions.append(kind)
        return {"predictions": np.tile(chunk.indices[:, None, None] + len(kind), (1, 5, 1))}

    def planted(self, job: Job, chunk: ImageChunk) -> Arrays:
        return {"planted": chunk.indices % 3 == 0}

    def attacked(
        self, job: Job, chunk: ImageChunk, right: np.ndarray, shown: np.ndarray, part: int
    ) -> Arrays:
        self.calls.append((job, part, chunk))
        rows = slice(len(right))
        indices, labels = chunk.indices[rows], chunk.labels[rows].numpy()
        fooled = right & (indices % 5 == part)
        return {
            "predictions": np.where(fooled, 8, np.where(right, labels, 9))[:, None],
            "distance": np.full(len(right), float(part)),
            "fooled": fooled,
            "loss": np.full(len(right), LOSS[part]),
            "pictures": np.full((len(shown), 8, 8, 3), part, dtype=np.uint8),
        }

    def passes(self, job: Job | None, part: int = 0) -> int:
        return 1

    def planted_passes(self, job: Job) -> int:
        return 1


@pytest.fixture
def evaluation(tmp_path: Any) -> Runner:
    pixels = RNG.integers(0, 256, (2 * NUMBER, 8, 8, 3), dtype=np.uint8)
    labels = np.zeros(2 * NUMBER, dtype=np.int64)
    labels[INDICES] = LABELS
    ids = np.array([str(index) for index in range(2 * NUMBER)])
    data = EvaluationData(
        source=ArraySource(images=pixels, labels=labels, class_names=list("abcd"), ids=ids),
        labels=labels,
        class_names=list("abcd"),
        indices=INDICES,
        curve_images=LIMIT,
        description={},
        batch_size=50,
    )
    journal = Journal(tmp_path / "journal", {})
    journal.prepare()
    curves = {Attacker.OBLIVIOUS: [PGD]}
    return Runner(
        evaluator=Attacked(),
        data=data,
        plan=Plan(main=[AUTOATTACK], epsilon_curves={}, steps_curves=curves, same_as={}),
        image_size=8,
        device=torch.device("cpu"),
        journal=journal,
    )


def calls_of(evaluation: Runner) -> list[tuple[Job, int, ImageChunk]]:
    return evaluation.evaluator.calls  # type: ignore[attr-defined]


def test_each_part_sees_those_that_withstood_the_ones_before(evaluation: Runner):
    evaluation.run()
    seen = [np.zeros(0, dtype=int) for _ in LOSS]
    for job, part, chunk in calls_of(evaluation):
        assert (chunk.indices == INDICES[chunk.rows]).all()
        if job == AUTOATTACK:
            seen[part] = np.concatenate([seen[part], chunk.rows])
    assert seen[0].tolist() == list(range(NUMBER))
    for part in (1, 2, 3):
        withstood = RIGHT & ((FOOLED_BY < 0) | (part <= FOOLED_BY))
        assert seen[part].tolist() == np.flatnonzero(withstood).tolist()


def test_later_parts_run_in_even_chunks_of_a_power_of_two(evaluation: Runner):
    evaluation.run()
    sizes = {part: list[tuple[int, int]]() for part in range(4)}
    for job, part, chunk in calls_of(evaluation):
        if job == AUTOATTACK:
            sizes[part].append((chunk.count, len(chunk.images)))
    assert [size for _, size in sizes[0]] == [128, 128, 128]
    for part in (1, 2, 3):
        number, places = sum(count for count, _ in sizes[part]), {size for _, size in sizes[part]}
        assert places == {-(-number // len(sizes[part]))}
        assert len(sizes[part]) == (2 if number > 128 else 1)


def test_only_attacks_of_several_steps_are_taken_over(evaluation: Runner):
    """An adaptive attacker knows what oblivious ones found; checks ask what many steps find."""
    rand = replace(AUTOATTACK, attack="autoattack-rand", on_survivors=True)
    knows = replace(rand, attacker=Attacker.ADAPTIVE)
    assert knows.follows(PGD) and not knows.follows(replace(PGD, attack="fgsm", steps=None))
    evaluation.plan = Plan(main=[PGD, knows], epsilon_curves={}, steps_curves={}, same_as={})
    evaluation.jobs = evaluation.plan.distinct()
    views: Any = SimpleNamespace(num_classes=4, hides=True)
    gap, *_ = compare_attackers(evaluation.run(), views)
    assert gap.outcome == "masking"


def test_what_fooled_is_kept_else_what_came_nearest(evaluation: Runner):
    results = evaluation.run()
    found = results.arrays[AUTOATTACK]
    assert found["fooled_by"].tolist() == FOOLED_BY.tolist()
    assert (found["predictions"][FOOLED_BY >= 0] == 8).all()
    survivors = RIGHT & (FOOLED_BY < 0)
    assert (found["predictions"][survivors, 0] == LABELS[survivors]).all()
    assert (found["predictions"][~RIGHT] == 9).all()
    kept = np.where(survivors, np.argmax(LOSS), np.maximum(FOOLED_BY, 0))
    assert found["distance"].tolist() == kept.tolist()
    assert len(results.gallery) == 8
    assert results.pictures[AUTOATTACK][:, 0, 0, 0].tolist() == kept[results.gallery].tolist()
    assert list(results.pictures) == [AUTOATTACK]


def test_autoattack_on_a_random_model_leaves_out_what_an_earlier_attack_fools(evaluation: Runner):
    rand = replace(AUTOATTACK, attack="autoattack-rand", on_survivors=True)
    evaluation.plan = Plan(main=[PGD, rand], epsilon_curves={}, steps_curves={}, same_as={})
    evaluation.jobs = evaluation.plan.distinct()
    results = evaluation.run()
    seen = [chunk.indices % 5 for job, part, chunk in calls_of(evaluation) if job == rand]
    withstood = RIGHT & (INDICES % 5 > 0)
    assert sum(map(len, seen)) == 2 * withstood.sum()  # both parts
    assert all((fives > 0).all() for fives in seen)
    found = results.arrays[rand]
    fives = np.where(RIGHT, INDICES % 5, 9)
    expected = np.select([fives == 0, fives == 1], [2, 1], -1)
    assert found["fooled_by"].tolist() == expected.tolist()
    assert (found["predictions"][expected > 0] == 8).all()
    assert (results.robust(rand)[:, 0] == (expected < 0) & RIGHT).all()
    assert (results.withstood([rand])[:, 0] == (expected != 1) & RIGHT).all()  # 0 was PGD's
    assert (results.withstood([PGD, rand]) == results.worst_case([PGD, rand])).all()
    shown = expected[results.gallery]
    assert results.pictures[rand][shown == 2, 0, 0, 0].tolist() == [0] * (shown == 2).sum()
    assert (results.pictures[rand][shown != 2, 0, 0, 0] == 1).all()


def test_what_fools_in_the_attack_but_not_when_scored_goes_to_the_next_part(evaluation: Runner):
    attacked = evaluation.evaluator.attacked

    def rounded(job: Job, chunk: ImageChunk, right: np.ndarray, *others: Any) -> Arrays:
        found, rows = attacked(job, chunk, right, *others), slice(len(right))
        scored_right = right & (chunk.indices[rows] % 10 == 0)
        found["predictions"][scored_right, 0] = chunk.labels[rows].numpy()[scored_right]
        return found

    evaluation.evaluator.attacked = rounded  # type: ignore[method-assign]
    found = evaluation.run().arrays[AUTOATTACK]["fooled_by"]
    assert found.tolist() == np.where(INDICES % 10 == 0, -1, FOOLED_BY).tolist()
    last = [chunk.indices for _, part, chunk in calls_of(evaluation) if part == 3]
    assert np.isin(INDICES[RIGHT & (INDICES % 10 == 0)], np.concatenate(last)).all()


def test_a_curve_is_of_the_first_images(evaluation: Runner):
    found = evaluation.run().arrays[PGD]
    assert len(found["predictions"]) == LIMIT
    assert found["fooled"].tolist() == (FOOLED_BY[:LIMIT] == 0).tolist()


def test_fixed_randomness_is_of_all_images_and_watched_pgd_of_the_curves(evaluation: Runner):
    evaluation.plan = replace(evaluation.plan, fixed=PGD, watched=PGD)
    results = evaluation.run()
    assert results.fixed is not None and results.fixed.tolist() == (INDICES % 3 > 0).tolist()
    assert results.indicators["cosine"].tolist() == INDICES[:LIMIT].tolist()


def test_corruptions_come_in_the_order_of_the_images_and_from_the_journal(evaluation: Runner):
    evaluation.corruptions = ("fog", "snow")
    first = evaluation.run()
    assert list(first.corrupted) == ["fog", "snow"]
    for kind, found in first.corrupted.items():
        assert found["predictions"].shape == (NUMBER, 5, 1)
        assert (found["predictions"] == INDICES[:, None, None] + len(kind)).all()
    done = evaluation.evaluator.corruptions  # type: ignore[attr-defined]
    done.clear()
    assert evaluation.journal is not None
    (evaluation.journal.folder / "corrupted-snow" / "00001.npz").unlink()
    again = evaluation.run()
    assert done == ["snow"]
    for kind, found in first.corrupted.items():
        assert (again.corrupted[kind]["predictions"] == found["predictions"]).all()


def test_examples_are_planted_in_the_first_images(evaluation: Runner):
    evaluation.planted, evaluation.plan = 150, replace(evaluation.plan, planted=PGD)
    planted = evaluation.run().planted["planted"]
    assert (planted == (INDICES[:150] % 3 == 0)).all()


def test_done_parts_are_taken_from_the_journal(evaluation: Runner):
    first = evaluation.run()
    calls_of(evaluation).clear()
    parts = sorted(evaluation.journal.folder.glob(f"{AUTOATTACK.key}-*/*.npz"))
    assert {part.parent.name.removeprefix(f"{AUTOATTACK.key}-") for part in parts} == {
        *("apgd-t", "fab-t", "square")
    }
    parts[0].unlink()
    again = evaluation.run()
    assert [(job, part) for job, part, _ in calls_of(evaluation)] == [(AUTOATTACK, 1)]
    for name, values in first.arrays[AUTOATTACK].items():
        assert np.array_equal(values, again.arrays[AUTOATTACK][name])
