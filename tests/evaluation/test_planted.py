"""Planted adversarial examples: where they lie, who finds them, and whose last layer is found."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_submission.attacks import NORMS, image_seeds
from robust_submission.evaluation.batch import ChunkEvaluator
from robust_submission.evaluation.cache import Arrays
from robust_submission.evaluation.checks.strength import check_planted
from robust_submission.evaluation.chunks import FittingBatches, ImageChunk
from robust_submission.evaluation.plan import plan_jobs
from robust_submission.evaluation.planted import Planter, find_readout
from robust_submission.evaluation.results import Planted, share_of
from robust_submission.evaluation.views import LogProbabilities, build_views
from robust_submission.models.bpda import BPDA, Through
from robust_submission.models.gcm import GCM
from robust_submission.models.load import LoadedModel
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.settings import EvaluationSettings

CPU = torch.device("cpu")
COUNT, CLASSES, SEED = 20, 4, 3
IMAGES = torch.rand(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(*before: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 16, 3), nn.GELU(), nn.Flatten()
    return nn.Sequential(*before, *layers, nn.Linear(16 * 16, CLASSES)).eval()


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.5), ("l1", 3.0)])
def test_no_point_of_the_ball_exceeds_a_linear_models_maximum(norm: str, epsilon: float):
    """The features are the pixels: the maximum over the ball, without the box, is the dual norm."""
    torch.manual_seed(0)
    images = 0.4 + 0.2 * IMAGES  # the box is out of reach
    found = find_readout(nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)), images, CLASSES)
    assert found
    planter = Planter(deployed=found, seen=found, norm=norm, epsilon=epsilon, steps=20)
    plants = planter.plant(images, image_seeds(SEED, range(COUNT)))
    assert NORMS[norm].size(plants.points - images).max() <= epsilon * (1 + 1e-5)
    assert plants.points.min() >= 0 and plants.points.max() <= 1
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    clean = (plants.weights * images.flatten(1)).sum(dim=1) - plants.thresholds
    maximum = clean + epsilon * plants.weights.norm(dim=1, p=dual)
    reached = (plants.weights * plants.points.flatten(1)).sum(dim=1) - plants.thresholds
    assert (clean < 0).all() and (reached > 0).all() and (reached <= maximum + 1e-5).all()
    if norm != "l1":  # a step of sparse PGD moves several pixels, the best point a single one
        assert ((reached - clean) / (maximum - clean)).min() > 0.97


def planted(model: nn.Module, limit: int = 32) -> Arrays:
    rows = np.arange(COUNT)
    settings = EvaluationSettings(epsilon=(0.03,), steps=10, seed=SEED)
    named = LoadedModel(name="it", model=model, image_size=8)
    views = build_views(named, None, IMAGES[:8], list("abcd"), CPU, settings)
    padded = torch.cat([IMAGES, torch.zeros(12, 3, 8, 8)])
    labels = torch.zeros(32, dtype=torch.int64)
    chunk = ImageChunk(number=0, rows=rows, images=padded, labels=labels, indices=rows, digest="")
    job = plan_jobs(settings, views).planted
    assert job
    return ChunkEvaluator(views, settings, FittingBatches(limit)).planted(job, chunk)


def test_who_finds_what_is_planted_in_a_masked_model():
    found = planted(network(GCM()))
    assert found["planted"].all()
    counts = {name: int(values.sum()) for name, values in found.items()}
    assert counts["adaptive"] >= 19 and counts["oblivious"] <= 2 and counts["random"] == 0
    honest = planted(network())
    assert honest["adaptive"].sum() >= 19
    assert (honest["oblivious"] == honest["adaptive"]).all()


def test_the_same_is_found_in_smaller_batches_and_again():
    at_once, parts = planted(network(GCM())), planted(network(GCM()), limit=7)
    assert all((at_once[name] == parts[name]).all() for name in at_once)
    random = [planted(network(RandomResizePad(8, 6))) for _ in range(2)]
    assert all((random[0][name] == random[1][name]).all() for name in random[0])
    assert random[0]["planted"].sum() >= 19 and random[0]["adaptive"].sum() >= 19


class Twice(nn.Module):
    """Uses its classifier for a first look, then for the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = network()

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images + 0.01 * self.classifier(images)[:, :1, None, None])


class Mean(nn.Module):
    """Two networks: neither's last layer decides alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = network(), network(nn.AvgPool2d(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.first(images) + self.second(images)


def test_which_last_layers_are_found():
    plain, masked = network(), network(GCM())
    twice, mean = Twice(), Mean()
    convolutional = nn.Sequential(nn.Conv2d(3, CLASSES, 8), nn.Flatten())
    for model, layer, calls in (
        (plain, plain[-1], 1),
        (masked, masked[-1], 1),
        (LogProbabilities(nn.Sequential(plain, nn.Softmax(dim=1))), plain[-1], 1),
        (BPDA(masked, Through.OPERATIONS), masked[-1], 1),
        (twice, twice.classifier[-1], 2),
    ):
        found = find_readout(model, IMAGES, CLASSES)
        assert found and found.layer is layer and found.calls == calls, model
    for model in (mean, convolutional, lambda images: plain(images)):
        assert find_readout(model, IMAGES, CLASSES) is None


@pytest.mark.parametrize(
    ("found", "outcome"), [(98, "ok"), (75, "ok"), (60, "failed"), (0, "failed")]
)
def test_the_check_fails_below_four_fifths_beyond_chance(found: int, outcome: str):
    shares = {name: share_of(0, 100) for name in ("oblivious", "fgsm", "random")}
    check = check_planted(Planted(found=share_of(found, 100), **shares, left_out=0), "")
    assert check.outcome == outcome and check.found.startswith(f"{found} of 100 ")
    assert check_planted(None, "no layer").outcome == "not run"
