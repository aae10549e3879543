"""One job on one chunk: what it depends on, memory that runs out, unknown masking."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_submission.attacks import Model
from robust_submission.data.corruptions import Corruption
from robust_submission.evaluation.batch import ChunkEvaluator
from robust_submission.evaluation.cache import Arrays
from robust_submission.evaluation.checks.gradients import check_size, check_uphill
from robust_submission.evaluation.chunks import FittingBatches, ImageChunk
from robust_submission.evaluation.jobs import Attacker, Job
from robust_submission.evaluation.views import build_views
from robust_submission.models.gcm import GCM
from robust_submission.models.load import LoadedModel
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.settings import EvaluationSettings

CPU = torch.device("cpu")
COUNT, CLASSES = 20, 4
SIZE = 32  # of the chunk
PGD = Job(attack="pgd", attacker=Attacker.OBLIVIOUS, norm="linf", epsilon=0.1, steps=4)


def network(*before: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *before, nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES)
    )


def chunk(model: Model) -> ImageChunk:
    """Images with the labels that the model gives them, so that all are right when clean."""
    images = torch.zeros(SIZE, 3, 8, 8)
    images[:COUNT] = torch.rand(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    rows = np.arange(COUNT)
    return ImageChunk(number=3, rows=rows, images=images, labels=labels, indices=rows, digest="")


def evaluator_of(model: object, images: Tensor) -> ChunkEvaluator:
    named = LoadedModel(name="it", model=model, image_size=8)  # type: ignore[arg-type]
    settings = EvaluationSettings(epsilon=(0.1,), draws=3, eot=2)
    views = build_views(named, None, images[:2], [str(i) for i in range(CLASSES)], CPU, settings)
    return ChunkEvaluator(views, settings, FittingBatches(SIZE))


def ratio(clean: Arrays) -> np.ndarray:
    return clean["gradient"] / np.abs(clean["margin"])


RIGHT, SHOWN = np.ones(COUNT, dtype=bool), np.array([0, 5])


def test_attacks_only_what_is_correct_and_keeps_the_rest():
    model = network()
    given = chunk(model)
    evaluator = evaluator_of(model, given.images)
    right = np.arange(COUNT) % 2 == 0
    found = evaluator.attacked(PGD, given, right, SHOWN)
    clean = evaluator.clean(given)["predictions"]
    assert (clean[:, 0] == given.labels[:COUNT].numpy()).all()
    assert (found["predictions"][~right] == clean[~right]).all()
    assert (found["distance"][~right] == 0).all()
    assert (found["predictions"][right] != clean[right]).mean() > 0.5
    assert found["distance"].max() == pytest.approx(0.1, abs=1e-6)
    assert found["pictures"].shape == (2, 8, 8, 3) and found["pictures"].dtype == np.uint8
    shown = (given.images[0].permute(1, 2, 0) * 255).numpy()
    assert 1 <= np.abs(found["pictures"][0] - shown).max() <= 0.1 * 255 + 1
    first = evaluator.attacked(PGD, given, RIGHT[:6], SHOWN[:0])
    assert len(first["predictions"]) == len(first["distance"]) == len(first["fooled"]) == 6


def test_corrupted_images_depend_on_seed_index_kind_and_severity_alone():
    seen = list[Tensor]()

    def model(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1)[:, :CLASSES]

    whole = chunk(model)
    evaluator = evaluator_of(model, whole.images)
    some = torch.tensor([17, 4])
    part = ImageChunk(
        number=0,
        rows=some.numpy(),
        images=whole.images[some],
        labels=whole.labels[some],
        indices=some.numpy(),
        digest="",
    )
    seen.clear()
    found, again = (evaluator.corrupted("gaussian_noise", each) for each in (whole, part))
    assert found["predictions"].shape == (COUNT, 5, 1)
    assert (found["predictions"][some] == again["predictions"]).all()
    pixels = (whole.images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    for severity, (large, small) in enumerate(zip(seen[:5], seen[5:], strict=True), start=1):
        corrupt = Corruption(name="gaussian_noise", severity=severity)
        assert torch.equal(large[some], small)
        for index, seed in enumerate(corrupt.seeds(0, range(COUNT)).tolist()):
            expected = corrupt(pixels[index], np.random.default_rng(seed))
            assert ((large[index] * 255).round().byte().permute(1, 2, 0).numpy() == expected).all()
        assert (large[COUNT:] == 0).all()


def test_ticks_count_the_passes_and_no_job_needs_more_than_it_says():
    counted, ticks = list[int](), list[int]()

    class Counting(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            counted.append(len(images) * (2 if torch.is_grad_enabled() else 1))
            return images

    given = chunk(network())
    evaluator = evaluator_of(network(GCM(), RandomResizePad(8, 4), Counting()), given.images)
    evaluator.tick = ticks.append
    counted.clear()
    for attacker in (Attacker.OBLIVIOUS, Attacker.ADAPTIVE):
        job = replace(PGD, attacker=attacker)
        evaluator.attacked(job, given, RIGHT, SHOWN)
        assert sum(ticks) == sum(counted)
        padding = (SIZE - COUNT) * evaluator.passes(None)
        assert sum(ticks) == COUNT * evaluator.passes(job) + padding
        counted.clear()
        ticks.clear()
    evaluator.clean(given)
    assert sum(ticks) == sum(counted)


def test_a_part_of_several_says_whom_it_fooled():
    model = network()
    given = chunk(model)
    evaluator = evaluator_of(model, given.images)
    job = Job(attack="autoattack", attacker=Attacker.OBLIVIOUS, norm="linf", epsilon=0.02)
    right = np.arange(COUNT) % 2 == 0
    clean = evaluator.clean(given)["predictions"][:, 0]
    found = evaluator.attacked(job, given, right, SHOWN, part=1)
    fooled = found["predictions"][:, 0] != clean
    assert (found["fooled"] == fooled).all() and 0 < fooled.sum() < right.sum()
    assert (found["loss"][right] > 0).all() and (found["loss"][~right] == 0).all()
    assert found["loss"][fooled].min() > found["loss"][right & ~fooled].mean()
    assert not evaluator.attacked(PGD, given, right, SHOWN)["fooled"].any()


@pytest.mark.parametrize("attack", ["autoattack", "apgd-ce"])
def test_nothing_is_spared_that_a_random_model_gets_right_in_a_scored_draw(attack: str):
    inner = network()
    given = chunk(inner)

    class Unsure(RandomResizePad):
        """Right in the draws that are scored, wrong in those that attackers see."""

        def forward(self, images: Tensor) -> Tensor:
            return inner(images).roll(int(self.draw >= 1000), dims=1)

    evaluator = evaluator_of(nn.Sequential(Unsure(8, 7)), given.images)
    job = Job(attack=attack, attacker=Attacker.ADAPTIVE, norm="linf", epsilon=0.1)
    found = evaluator.attacked(job, given, RIGHT, SHOWN)
    assert (found["distance"] > 0.05).all()
    assert found["fooled"].all() == (attack == "autoattack")


@pytest.mark.parametrize("before", [(), (GCM(),), (RandomResizePad(8, 5), nn.Dropout(0.3))])
def test_the_same_again_whatever_came_before(before: tuple[nn.Module, ...]):
    model = network(*before).eval()
    given = chunk(model)
    evaluator = evaluator_of(model, given.images)
    first = evaluator.attacked(PGD, given, RIGHT, SHOWN)
    evaluator.clean(given)
    torch.rand(5)
    again = evaluator.attacked(PGD, given, RIGHT, SHOWN)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_noise_from_global_generators_is_repeated():
    inner = network()
    given = chunk(inner)

    def noisy(images: Tensor) -> Tensor:
        noise = torch.from_numpy(np.random.standard_normal(images.shape)).float()  # noqa: NPY002
        return inner(images + 0.2 * noise)

    evaluator = evaluator_of(noisy, given.images)
    first, again = (evaluator.attacked(PGD, given, RIGHT, SHOWN) for _ in range(2))
    assert first["predictions"].shape == (COUNT, 3)
    assert np.array_equal(first["predictions"], again["predictions"])
    assert len({tuple(draw) for draw in first["predictions"].T}) > 1
    at_zero = Job(attack="pgd", attacker=Attacker.OBLIVIOUS, norm="linf", epsilon=0.0, steps=4)
    unmoved = evaluator.attacked(at_zero, given, RIGHT, SHOWN)["predictions"]
    assert np.array_equal(unmoved, evaluator.clean(given)["predictions"])


@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_noise_held_fixed_hides_nothing(noise: float):
    """The noise of the held draw is taken off again: the model is then the network."""
    inner = network()
    given = chunk(inner)
    plain = evaluator_of(inner, given.images)
    plain._seed(given, 1)
    held = torch.randn(3, 8, 8)

    def noisy(images: Tensor) -> Tensor:
        return inner(images + noise * (torch.randn(3, 8, 8) - held))

    evaluator = evaluator_of(noisy, given.images)
    found = evaluator.fixed(PGD, given)["robust"]
    expected = plain.attacked(PGD, given, RIGHT, SHOWN)["predictions"][:, 0]
    assert np.array_equal(found, expected == given.labels[:COUNT].numpy()) and not found.all()
    few = evaluator.attacked(replace(PGD, few_draws=True), given, RIGHT, SHOWN)
    assert few["predictions"].shape == (COUNT, 1)


def test_pgd_is_watched_on_the_images_of_the_curves():
    model = network()
    given = chunk(model)
    honest = evaluator_of(model, given.images)
    found = honest.watched(PGD, 12, given)
    attacked = honest.attacked(PGD, given, RIGHT[:12], SHOWN[:0])["predictions"][:, 0]
    fooled = attacked != given.labels[:12].numpy()
    assert (found["fooled"] == fooled).all() and fooled.sum() > 0
    assert (found["cosine"] > 0.5).all() and not found["view_only"].any()
    shattered = network(Shattered())
    assert np.median(evaluator_of(shattered, given.images).watched(PGD, 12, given)["cosine"]) < 0.05

    evaluator = evaluator_of(model, given.images)
    evaluator.views = replace(
        evaluator.views, model=lambda images: model(given.images[: len(images)])
    )
    assert (evaluator.watched(PGD, 12, given)["view_only"] == found["fooled"]).all()


def test_out_of_memory_halves_and_finds_the_same():
    model, seen = network(), list[int]()
    given = chunk(model)
    expected = evaluator_of(model, given.images).attacked(PGD, given, RIGHT, SHOWN)

    def small(images: Tensor) -> Tensor:
        seen.append(len(images))
        if len(images) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return model(images)

    evaluator = evaluator_of(small, given.images)
    found = evaluator.attacked(PGD, given, RIGHT, SHOWN)
    assert max(seen) == COUNT and evaluator.fit.limit == 5
    assert np.array_equal(found["predictions"], expected["predictions"])
    np.testing.assert_allclose(found["distance"], expected["distance"], atol=1e-6)


class OthersConcealment(nn.Module):
    """GCM as someone else writes it: nothing that `reveal` knows."""

    def forward(self, images: Tensor) -> Tensor:
        return images + 1e-8 * torch.sin(1e20 * images)


def test_concealment_that_we_do_not_know_shows_in_the_size_of_gradients():
    model = network(OthersConcealment())
    given = chunk(model)
    clean = evaluator_of(model, given.images).clean(given)
    assert check_size(ratio(clean)).outcome == "masking"
    honest = evaluator_of(network(), given.images).clean(given)
    assert check_size(ratio(honest)).outcome == "ok"
    assert check_uphill(honest["rises"], random=False).outcome == "ok"


class Shattered(nn.Module):
    """Gradients of the right size in directions that mean nothing."""

    def forward(self, images: Tensor) -> Tensor:
        signs = torch.sign(torch.sin(1e5 * images.detach()))
        return images.detach() + signs * (images - images.detach())


def test_shattered_gradients_do_not_point_uphill():
    model = network(Shattered())
    given = chunk(model)
    clean = evaluator_of(model, given.images).clean(given)
    assert check_size(ratio(clean)).outcome == "ok"
    assert check_uphill(np.tile(clean["rises"], 5), random=False).outcome == "masking"


def test_not_a_number_is_no_prediction():
    model = network()
    given = chunk(model)

    def broken(images: Tensor) -> Tensor:
        return torch.where(images.flatten(1)[:, :1] > 0.5, torch.nan, model(images))

    predictions = evaluator_of(broken, given.images).clean(given)["predictions"][:, 0]
    bad = (given.images[:COUNT].flatten(1)[:, 0] > 0.5).numpy()
    assert (predictions[bad] == -1).all() and (predictions[~bad] >= 0).all() and bad.any()
