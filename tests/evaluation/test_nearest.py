"""The curve over epsilon from one minimum-norm run: what counts as fallen at a radius."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from robust_submission import evaluate
from robust_submission.evaluation.jobs import Attacker, Job, Plan
from robust_submission.evaluation.results import Results, median_distance

NEAREST = Job(attack="fmn", attacker=Attacker.ADAPTIVE, norm="linf", epsilon=0.5, steps=9)
PGD = Job(attack="pgd", attacker=Attacker.ADAPTIVE, norm="linf", epsilon=0.1, steps=2)


class Plane(nn.Module):
    """Two classes, apart by a plane."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 48).view(3, 4, 4))

    def forward(self, images: Tensor) -> Tensor:
        score = 9 * ((images - 0.5) * self.weight).sum(dim=(1, 2, 3))
        return torch.stack([-score, score], dim=1)


@pytest.mark.parametrize(("norm", "size"), [("linf", 1), ("l2", 2)])
def test_the_curve_of_a_plane_is_its_distances(norm: str, size: int, tmp_path):
    model, images = Plane(), 0.4 + 0.2 * torch.rand(40, 3, 4, 4)
    with torch.no_grad():
        margins = model(images).diff(dim=1).abs().squeeze(1) / 18
        labels = model(images).argmax(dim=1)
    labels[:4] = 1 - labels[:4]  # wrong when clean
    distances = margins / model.weight.detach().norm(p=size)
    distances[:4] = 0
    options = {"norm": norm, "epsilon": 0.01, "attacks": ("fgsm",), "curve_images": 40}
    report = evaluate(model, images, labels, steps=5, out=tmp_path, **options)
    (curve,) = [each for each in report.curves if each.median]
    assert curve.attacks == ("fmn-50" if norm == "linf" else "ddn-50", "pgd-5")
    for radius, share in zip(curve.x, curve.accuracy, strict=True):
        assert (distances > radius).sum() <= share.count <= (1.02 * distances > radius).sum()
    middle = float(distances.sort().values[19])
    assert middle <= report.median.value <= 1.02 * middle
    found = pd.read_csv(tmp_path / "per_image.csv")["nearest distance"]
    np.testing.assert_allclose(found, distances, rtol=0.02)


def test_the_nearer_of_both_attacks_counts_and_only_what_fools():
    """Of four images: wrong when clean; fooled by both, by PGD alone, by none."""
    fooled = {NEAREST: [1, 1, 0, 0], PGD: [1, 1, 1, 0]}
    moved = {NEAREST: [0, 0.05, 0.2, 0], PGD: [0, 0.09, 0.1 + 1e-9, 0.1]}
    arrays = {
        job: {"predictions": np.array(fooled[job])[:, None], "distance": np.array(moved[job])}
        for job in fooled
    }
    plan = Plan(
        main=[PGD],
        epsilon_curves={Attacker.ADAPTIVE: [PGD]},
        steps_curves={},
        same_as={},
        nearest=NEAREST,
    )
    results = Results(
        plan=plan,
        labels=np.zeros(4, dtype=int),
        curve_images=4,
        clean={"predictions": np.array([[1], [0], [0], [0]])},
        arrays=arrays,
        gallery=[],
        pictures={},
    )
    assert results.nearest is not None
    assert results.nearest.tolist() == [0, 0.05, 0.1, np.inf]


def test_the_median_and_its_interval():
    """Of 100 images the 40th and the 61st (Conover's table)."""
    found = median_distance(np.random.default_rng(0).permutation(100) + 1.0, "l2")
    assert (found.value, found.low, found.high, found.total) == (50, 40, 61, 100)
    assert found.words == "within 50" and found.interval == "40 to 61"
    some = median_distance(np.where(np.arange(100) < 45, 0.2, np.inf), "linf")
    assert (some.value, some.low, some.high) == (None, 0.2, None)
    assert some.words == "nowhere" and some.interval == "51/255 to unbounded"
