"""A robustness report as evaluate.py would make it, for the tests of its files and its page."""

import numpy as np
import pytest

from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import (
    Check,
    Curve,
    Measurement,
    MedianDistance,
    share_of,
)
from robust_submission.report.gallery import gallery_rows
from robust_submission.report.schema import GalleryImage, Report
from robust_submission.report.write import render_page


def make_measurement(
    attack="pgd", attacker=Attacker.OBLIVIOUS, count=940, **changes
) -> Measurement:
    values = {
        "name": f"{attack} {attacker}",
        "attack": attack,
        "attacker": attacker,
        "norm": "linf",
        "epsilon": 8 / 255,
        "settings": {"steps": 20, "step_size": 2 / 255},
        "robust_accuracy": share_of(count, 1000),
        "attack_robustness": share_of(count, 950),
        "largest_perturbation": 8 / 255,
    }
    return Measurement(**{**values, **changes})


MEDIAN = MedianDistance(norm="linf", value=3.4 / 255, low=3 / 255, high=None, total=1000)


def curve(name, attacker, norm, x, counts, **changes) -> Curve:
    points = tuple(share_of(count, 1000) for count in counts)
    values = {"name": name, "attacker": attacker, "norm": norm, "attacks": ("pgd-20",)}
    return Curve(**{**values, "x": tuple(x), "accuracy": points, **changes})


def make_report(**changes) -> Report:
    epsilons = [0.0, 1 / 255, 8 / 255, 32 / 255]
    values = {
        "model": {"name": "resnet18-gcm", "num_classes": 10, "random": False},
        "data": {"source": "cifar10", "images": 1000},
        "threat_model": "The attacker knows everything.\n\nHe may change every pixel.",
        "seed": 7,
        "clean": share_of(950, 1000),
        "twin_clean": share_of(954, 1000),
        "oblivious": share_of(940, 1000),
        "adaptive": share_of(3, 1000),
        "oblivious_robustness": share_of(940, 950),
        "adaptive_robustness": share_of(3, 950),
        "measurements": (
            make_measurement("fgsm", Attacker.ADAPTIVE, 148),
            make_measurement("pgd", Attacker.ADAPTIVE, 4),
            make_measurement("fgsm", Attacker.OBLIVIOUS, 946),
            make_measurement("pgd", Attacker.TRANSFER, 106),
            make_measurement("pgd", Attacker.OBLIVIOUS, 944),
        ),
        "curves": (
            curve("epsilon", Attacker.OBLIVIOUS, "linf", epsilons, [950, 948, 944, 860]),
            curve("epsilon", Attacker.ADAPTIVE, "linf", epsilons, [950, 530, 4, 0],
                  attacks=("fmn-50", "pgd-20"), median=MEDIAN),
            curve("epsilon", Attacker.ADAPTIVE, "l2", [0.0, 0.5], [950, 34]),
            curve("steps", Attacker.ADAPTIVE, "linf", [1, 10, 20, 80], [148, 6, 4, 4]),
        ),
        "checks": (
            Check(name="one-step", question="Does one step beat many?", outcome="ok",
                  expected="no", found="94.6 % against 94.4 %"),
            Check(name="black-box", question="Does a black box beat the white box?",
                  outcome="masking", expected="no", found="10.6 % against 94.4 %"),
            Check(name="draws", question="Do draws agree?", outcome="not run",
                  expected="yes", found="the model is not random"),
        ),
        "verdict": "masked",
        "gallery": (
            GalleryImage(id="a.png", label="cat", clean_prediction="cat",
                    oblivious_prediction="cat", adaptive_prediction="dog"),
            GalleryImage(id="b.png", label="ship", clean_prediction="frog",
                    oblivious_prediction="ship", adaptive_prediction="truck"),
        ),
        "provenance": {"python": "3.11", "packages": {"torch": "2.15.0"}},
    }  # fmt: skip
    return Report(**{**values, **changes})


def make_pictures(count=2, size=8) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    clean = [rng.integers(8, 248, (size, size, 3), dtype=np.uint8) for _ in range(count)]
    noise = [rng.integers(-8, 9, (size, size, 3)) for _ in range(count)]
    attacked = [(a + b).astype(np.uint8) for a, b in zip(clean, noise, strict=True)]
    return {"clean": clean, "oblivious": attacked, "adaptive": attacked[::-1]}


@pytest.fixture(scope="session")
def measured():
    """Makes a measurement; arguments replace its fields."""
    return make_measurement


@pytest.fixture(scope="session")
def example():
    """Makes a report; arguments replace its fields."""
    return make_report


@pytest.fixture(scope="session")
def drawn():
    """Makes the pictures of a gallery of so many images."""
    return make_pictures


@pytest.fixture(scope="session")
def rendered():
    """Makes the page of a report."""

    def render(report: Report) -> str:
        return render_page(report, *gallery_rows(report, make_pictures(len(report.gallery))))

    return render
