"""Every check both ways: what an honest model of 100 images shows, and what a masked one does."""

from typing import Any

import numpy as np
import pytest

from robust_submission.evaluation.checks import (
    comparisons,
    curves,
    gradients,
    indicators,
    outputs,
    verdict,
)
from robust_submission.evaluation.checks.rule import only_fooled_by
from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.results import share_of

NAN, INFINITE = np.nan, np.inf


def survival(survivors: int, total: int = 100) -> np.ndarray:
    """The first `survivors` of `total` images survive."""
    return (np.arange(total) < survivors).astype(float)


def apart(only_first: int, only_second: int) -> tuple[np.ndarray, np.ndarray]:
    """Survival under two attacks, of which each fools so many images that the other does not."""
    first, second = np.ones(100), np.ones(100)
    first[:only_first] = 0
    second[only_first : only_first + only_second] = 0
    return first, second


def test_sign_test_against_the_binomial_by_hand():
    assert only_fooled_by(*apart(3, 0)) == (3, 0, pytest.approx(1 / 8))
    assert only_fooled_by(*apart(3, 1)) == (3, 1, pytest.approx(5 / 16))
    assert only_fooled_by(*apart(0, 0)) == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("gradient", "outcome"),
    [
        ([1, 2, 3], "ok"),
        ([NAN, *range(99)], "warning"),
        ([1, NAN, 3], "masking"),
        ([0, 0, 0], "ok"),
        ([], "not run"),
    ],
)
def test_finite(gradient: list[float], outcome: str):
    assert gradients.check_finite(np.array(gradient, dtype=float)).outcome == outcome


@pytest.mark.parametrize(
    ("zero", "total", "outcome"),
    [(0, 100, "ok"), (1, 100, "ok"), (1, 5, "ok"), (30, 100, "masking"), (0, 0, "not run")],
)
def test_zero(zero: int, total: int, outcome: str):
    gradient = np.where(np.arange(total) < zero, 0.0, 1.0)
    assert gradients.check_zero(gradient).outcome == outcome
    adaptive = gradients.check_adaptive_gradient(np.where(gradient == 0, NAN, 1)).outcome
    assert adaptive == {"masking": "failed"}.get(outcome, outcome)


@pytest.mark.parametrize(
    ("ratios", "outcome"),
    [
        ([200.0] * 9, "ok"),  # a natural model, fooled at 1/200
        ([2.5] * 9, "ok"),  # a robust one, fooled at 0.4
        ([1e12] * 9, "masking"),  # GCM
        ([1e-10] * 9, "masking"),  # saturated
        ([100.0] * 6 + [1e13] * 5, "ok"),  # the median decides
        ([], "not run"),
    ],
)
def test_size(ratios: list[float], outcome: str):
    assert gradients.check_size(np.array(ratios)).outcome == outcome


@pytest.mark.parametrize(
    ("share_up", "total", "random", "outcome"),
    [
        (0.98, 100, False, "ok"),
        (0.70, 20, False, "ok"),  # too few to tell
        (0.52, 100, False, "masking"),
        (0.52, 100, True, "warning"),
        (0, 0, False, "not run"),
    ],
)
def test_uphill(share_up: float, total: int, random: bool, outcome: str):
    rises = np.arange(total) < share_up * total
    assert gradients.check_uphill(rises, random).outcome == outcome


def test_outputs_without_logits_gradients_or_repetition_are_warnings():
    for check, good, bad in (
        (outputs.check_outputs, (False,), (True,)),
        (outputs.check_deterministic, (False, 1, 1), (True, 5, 10)),
        (gradients.check_gradient_exists, (True, False), (False, True)),
        (gradients.check_optimises, (False,), (True,)),
    ):
        assert check(*good).outcome == "ok" and check(*bad).outcome == "warning"
    assert "5 others" in outputs.check_deterministic(True, 5, 10).found


@pytest.mark.parametrize(
    ("only_one", "only_many", "outcome"),
    [(0, 40, "ok"), (1, 0, "ok"), (3, 1, "ok"), (12, 2, "masking"), (7, 0, "masking")],
)
def test_one_step(only_one: int, only_many: int, outcome: str):
    assert (
        comparisons.check_one_step(*apart(only_one, only_many), Attacker.ADAPTIVE).outcome
        == outcome
    )


@pytest.mark.parametrize(
    ("only_black", "only_white", "outcome"),
    [(0, 30, "ok"), (2, 50, "ok"), (3, 0, "ok"), (12, 0, "masking"), (12, 60, "masking")],
)
def test_black_box(only_black: int, only_white: int, outcome: str):
    assert comparisons.check_black_box(*apart(only_black, only_white), "square").outcome == outcome


@pytest.mark.parametrize(
    ("oblivious", "adaptive", "outcome"),
    [
        (95, 2, "masking"),
        (50, 50, "ok"),
        (50, 47, "ok"),  # three images of 100 are chance
        (10, 0, "masking"),
        (47, 50, "ok"),
    ],
)
def test_gap(oblivious: int, adaptive: int, outcome: str):
    assert comparisons.check_gap(survival(oblivious), survival(adaptive)).outcome == outcome


def test_gap_of_a_random_model_within_its_noise():
    noise = np.random.default_rng(0).choice([-0.2, 0, 0.2], 100)
    assert comparisons.check_gap(0.5 + noise, np.full(100, 0.5)).outcome == "ok"
    assert comparisons.check_gap(0.7 + noise, np.full(100, 0.5)).outcome == "masking"


def test_a_significant_gap_below_a_point_is_no_masking():
    assert comparisons.check_gap(survival(5030, 10_000), survival(5000, 10_000)).outcome == "ok"


@pytest.mark.parametrize(
    ("pgd", "autoattack", "outcome"),
    [(49, 34, "ok"), (54, 34, "warning"), (50, 48, "ok"), (34, 49, "ok"), (0, 0, "ok")],
)
def test_autoattack_over_pgd(pgd: int, autoattack: int, outcome: str):
    found = comparisons.check_pgd(survival(pgd), survival(autoattack), "AutoAttack", 15)
    assert found.outcome == outcome and found.name == "PGD finds what AutoAttack finds"
    few = survival(2 * pgd // 10, 20), survival(2 * autoattack // 10, 20)
    assert comparisons.check_pgd(*few, "screen", 15).outcome == "ok"  # chance


@pytest.mark.parametrize(
    ("classes", "correct", "pgd", "autoattack", "outcome"),
    [
        (10, 7798, 5343, 4812, "ok"),  # N-FGSM
        (10, 8040, 5584, 4928, "ok"),  # FGSM-UAP
        (10, 8229, 5178, 3659, "warning"),  # SSAT
        (10, 8728, 4206, 330, "warning"),  # ELLE
        (100, 5847, 2379, 1329, "ok"),  # NuAT
    ],
)
def test_published_gaps(classes: int, correct: int, pgd: int, autoattack: int, outcome: str):
    """Counts of FastAT's runs (arXiv 2604.22853)."""
    both = survival(pgd, correct), survival(autoattack, correct)
    points = comparisons.usual_gap(classes)
    assert comparisons.check_pgd(*both, "AutoAttack", points).outcome == outcome


@pytest.mark.parametrize(
    ("only_others", "only_screen", "outcome"),
    [(0, 0, "ok"), (1, 0, "ok"), (2, 0, "warning"), (2, 30, "warning"), (0, 30, "ok")],
)
def test_a_screen_misses_almost_nothing(only_others: int, only_screen: int, outcome: str):
    assert comparisons.check_screen(*apart(only_others, only_screen)).outcome == outcome


@pytest.mark.parametrize(
    ("check", "values", "outcome", "random"),
    [
        (indicators.check_unstable, (1, 30), "ok", "ok"),
        (indicators.check_unstable, (4, 30), "warning", "warning"),
        (indicators.check_silent, (2, 30), "ok", "ok"),
        (indicators.check_silent, (6, 100), "failed", "warning"),
        (indicators.check_view, (0, 30), "ok", "ok"),
        (indicators.check_view, (6, 100), "failed", "warning"),
    ],
)
def test_signs_that_should_be_rare(check: Any, values: tuple[int, int], outcome: str, random: str):
    seen = np.arange(values[1]) < values[0]
    others = [()] if check is indicators.check_unstable else [(False,), (True,)]
    expected = [outcome, random]
    assert [check(seen, *more).outcome for more in others] == expected[: len(others)]


@pytest.mark.parametrize(
    ("cosine", "outcome", "random"),
    [
        (0.9, "ok", "ok"),  # honest models: 0.7 to 0.99
        (0.1, "ok", "ok"),
        (0.002, "failed", "warning"),
        (-0.3, "failed", "warning"),
    ],
)
def test_direction_of_gradients(cosine: float, outcome: str, random: str):
    values = cosine + np.linspace(-0.01, 0.01, 30)
    assert indicators.check_direction(values, False).outcome == outcome
    assert indicators.check_direction(values, True).outcome == random


@pytest.mark.parametrize(
    ("rising", "total", "outcome"),
    [(0, 10, "ok"), (4, 10, "ok"), (6, 10, "warning"), (30, 100, "ok"), (0, 0, "not run")],
)
def test_loss_that_still_rises(rising: int, total: int, outcome: str):
    rise = np.where(np.arange(total) < rising, 0.25, 0.07)  # steady; of adversarial training
    assert indicators.check_rising(rise).outcome == outcome


@pytest.mark.parametrize(
    ("count", "total", "chance", "outcome"),
    [
        (0, 32, 0.1, "ok"),
        (3, 32, 0.1, "ok"),
        (12, 32, 0.1, "masking"),
        (15, 32, 0.5, "ok"),
        (0, 0, 0.1, "not run"),
    ],
)
def test_large_epsilon(count: int, total: int, chance: float, outcome: str):
    robust = (np.arange(total) < count)[:, None]
    adaptive = curves.check_large_epsilon(robust, 0.5, chance, Attacker.ADAPTIVE_BPDA)
    assert adaptive.outcome == {"masking": "failed"}.get(outcome, outcome)
    found = curves.check_large_epsilon(robust, 0.5, chance, Attacker.OBLIVIOUS)
    assert found.outcome == outcome and found.name == "large epsilon, oblivious"
    assert "epsilon 0.5" in found.expected


@pytest.mark.parametrize(
    ("alone", "total", "outcome"),
    [(0, 30, "ok"), (3, 100, "ok"), (7, 100, "warning"), (0, 0, "not run")],
)
def test_pgd_as_a_control_of_the_minimum_norm_attack(alone: int, total: int, outcome: str):
    assert curves.check_nearest(np.arange(total) < alone).outcome == outcome


@pytest.mark.parametrize(
    ("once", "twice", "outcome"), [(50, 50, "ok"), (50, 48, "ok"), (50, 30, "warning")]
)
def test_converged(once: int, twice: int, outcome: str):
    assert curves.check_converged(survival(once), survival(twice), 20).outcome == outcome


def test_epsilon_zero_has_no_tolerance():
    clean = np.arange(12).reshape(6, 2)
    other = clean.copy()
    other[3, 1] = 0
    assert curves.check_epsilon_zero(clean, clean.copy()).outcome == "ok"
    assert curves.check_epsilon_zero(clean, other).outcome == "warning"


def test_ball_forgives_rounding_only():
    epsilons = np.array([8 / 255, 1600.0])
    inside = epsilons * (1 + 1e-5)
    assert outputs.check_ball(inside, epsilons).outcome == "ok"
    assert outputs.check_ball(np.array([9 / 255, 1600]), epsilons).outcome == "warning"


def test_clean_accuracy_at_chance():
    assert outputs.check_clean_accuracy(share_of(80, 100), 0.1).outcome == "ok"
    chance = outputs.check_clean_accuracy(share_of(11, 100), 0.1)
    assert chance.outcome == "warning" and "normalisation" in chance.found


def test_any_sign_of_masking_decides_the_verdict():
    passed, warning = outputs.check_outputs(False), outputs.check_outputs(True)
    assert verdict([passed, warning], 0.4) == "no sign of masking"
    assert verdict([passed, comparisons.check_gap(survival(95), survival(2))], 0.4) == "masked"


def test_a_screen_alone_acquits_only_where_every_check_passes():
    passed, warning = outputs.check_outputs(False), outputs.check_outputs(True)
    failed, masking = (
        gradients.check_gradient_exists(False, False),
        gradients.check_zero(np.zeros(9)),
    )
    nothing = indicators.check_rising(np.zeros(0))
    for checks, adaptive, expected in (
        ([passed, nothing], 0.4, "no sign of masking"),
        ([passed, warning], 0.4, "screened only"),
        ([passed, failed], 0.02, "screened only"),
        ([passed, failed], 0.4, "evaluation failed"),
        ([warning, masking], 0.4, "masked"),
    ):
        assert verdict(checks, adaptive, screened=True) == expected


def test_a_failed_attack_decides_the_verdict_unless_nothing_was_left():
    failed = gradients.check_gradient_exists(False, False)
    checks = [failed, comparisons.check_gap(survival(95), survival(2))]
    assert verdict(checks, 0.4) == "evaluation failed"
    assert verdict(checks, 0.02) == "masked"


def test_adaptive_gradients_that_lose_to_black_boxes_have_failed():
    assert comparisons.check_adaptive(*apart(12, 0)).outcome == "failed"
    assert comparisons.check_adaptive(*apart(2, 40)).outcome == "ok"
