"""Which attacks are run, by which attacker, and which are not run twice."""

from typing import Any

import pytest
import torch
from torch import nn

from robust_submission.attacks import PGD
from robust_submission.evaluation.jobs import Attacker, Job, Plan
from robust_submission.evaluation.plan import plan_jobs, unbounded
from robust_submission.evaluation.views import Views
from robust_submission.models import bpda
from robust_submission.settings import EvaluationSettings

OBLIVIOUS, ADAPTIVE, BPDA, TRANSFER = Attacker


def identity(images: torch.Tensor) -> torch.Tensor:
    return images


def views(**changes: Any) -> Views:
    """Of a model that hides something and has a twin."""
    masked = {OBLIVIOUS: identity, ADAPTIVE: nn.Identity(), TRANSFER: nn.Identity()}
    values = {"name": "model", "model": identity, "seen_by": masked, "image_size": 32}
    values |= {"device": torch.device("cpu"), "num_classes": 10}
    values |= {"random": False, "softmax": False, "differentiable": True, "saturates": False}
    return Views(**(values | changes))


HONEST: dict[str, Any] = {"seen_by": {OBLIVIOUS: identity, ADAPTIVE: identity}}
FOUND = {"seen_by": HONEST["seen_by"] | {BPDA: bpda.BPDA(identity, bpda.Through.IMAGES)}}


def plan(attacks: str, changes: dict[str, Any] | None = None, **settings: Any) -> Plan:
    chosen = {"attacks": tuple(attacks.split()), "steps": 7, "curves": False} | settings
    return plan_jobs(EvaluationSettings(**chosen), views(**(changes or {})))


def multiples_of(jobs: list[Job]) -> list[float]:
    return [job.epsilon * 255 / 8 for job in jobs]


def names(jobs: list[Job]) -> list[str]:
    return [job.name for job in jobs]


def test_every_attack_runs_for_both_attackers_then_the_controls():
    found = plan("fgsm pgd", epsilon=(8 / 255, 0.1))
    assert names(found.main) == [
        f"{name.replace('E', epsilon)}"
        for epsilon in ("8/255", "0.1")
        for name in (
            "fgsm linf E oblivious",
            "fgsm linf E adaptive",
            "pgd-7 linf E oblivious",
            "pgd-7 linf E adaptive",
            "noise linf E oblivious",
            "pgd-7 linf E transfer",
        )
    ]
    assert not found.epsilon_curves and not found.steps_curves
    assert names(found.headline(TRANSFER)) == ["pgd-7 linf 8/255 transfer"]


def test_what_cannot_be_held_or_differentiated_is_left_out():
    random = {"random": True, "readouts": {OBLIVIOUS: None, ADAPTIVE: None}}
    held, drawing = (plan("pgd", random | {"repeats": each}, curves=True) for each in (True, False))
    assert held.fixed and held.planted and not (drawing.fixed or drawing.planted)
    assert drawing.watched
    assert not plan("pgd", {"twin_differentiable": False}).headline(TRANSFER)


def test_attacks_with_gradients_are_also_passed_straight_through_a_trn():
    restored = views().seen_by | {BPDA: nn.Identity()}  # type: ignore[operator]
    found = plan("pgd square", {"seen_by": restored}, curves=True)
    assert names(found.main) == [
        "pgd-7 linf 8/255 oblivious",
        "pgd-7 linf 8/255 adaptive",
        "pgd-7 linf 8/255 adaptive-bpda",
        "square linf 8/255 oblivious",
        "square linf 8/255 adaptive",
        "noise linf 8/255 oblivious",
        "pgd-7 linf 8/255 transfer",
    ]
    assert list(found.steps_curves) == [OBLIVIOUS, ADAPTIVE]
    assert found.watched and found.watched.name == "pgd-7 linf 8/255 adaptive"
    assert plan("pgd").watched is None


def test_curves_share_their_points_with_the_attacks_on_all_images():
    found = plan("pgd", steps=20, curves=True)
    adaptive = found.epsilon_curves[ADAPTIVE]
    largest = 0.5 * 255 / 8
    assert multiples_of(found.epsilon_curves[OBLIVIOUS]) == pytest.approx([0, 1, 4, largest])
    assert multiples_of(adaptive) == pytest.approx([0, 0.5, 1, 2, largest])
    assert found.nearest is not None and found.nearest.name == "fmn-50 linf 0.5 adaptive"
    assert found.jobs[-1] == found.nearest and plan("pgd").nearest is None
    many = plan("pgd", steps=80, norm="l2", curves=True).nearest
    assert many is not None and many.label == "ddn-80"
    assert [each.steps for each in found.steps_curves[ADAPTIVE]] == [1, 2, 5, 10, 20, 40]
    distinct = found.distinct()
    assert all(distinct[job] for job in found.main) and not distinct[adaptive[0]]
    assert len(distinct) == len({each.key for each in distinct})


def test_a_model_that_hides_nothing_is_attacked_once_and_has_no_twin():
    found = plan("fgsm pgd", HONEST, curves=True)
    assert {each.attacker for each in found.main} == {OBLIVIOUS, ADAPTIVE}
    assert {each.attacker for each in found.distinct()} == {OBLIVIOUS}
    random = plan("pgd", HONEST | {"random": True})
    assert {each.attacker for each in random.distinct()} == {OBLIVIOUS, ADAPTIVE}


def test_a_random_model_gets_few_draws_on_curves_and_the_rand_version_of_autoattack():
    found = plan("pgd autoattack", HONEST | {"random": True}, curves=True)
    rand = [job for job in found.main if job.attack.startswith("autoattack")]
    assert [job.parts for job in rand] == [("apgd-ce", "apgd-dlr")] * 2
    assert all(job.on_survivors for job in rand) and not any(job.few_draws for job in found.main)
    curves = [*found.epsilon_curves[ADAPTIVE], *found.steps_curves[OBLIVIOUS]]
    largest = 0.5 * 255 / 8
    assert multiples_of(curves[:7]) == pytest.approx([0, 0.25, 0.5, 1, 2, 4, largest])
    assert found.nearest is None
    assert all(job.few_draws for job in curves) and not set(curves) & set(found.main)
    assert found.fixed is not None and found.fixed.name == "pgd-7 linf 8/255 adaptive"
    assert found.fixed not in found.main and plan("pgd").fixed is None
    oblivious, adaptive = rand
    assert adaptive.follows(found.main[0]) and not oblivious.follows(found.main[1])


@pytest.mark.parametrize(("random", "alone"), [(False, "pgd screen"), (True, "screen")])
def test_a_screen_stands_in_for_autoattack_unless_that_is_run(random: bool, alone: str):
    assert plan(alone, {"random": random}).screened
    assert not plan(f"{alone} autoattack", {"random": random}).screened
    assert not plan("pgd apgd-t", {"random": random}).screened
    screens = [job for job in plan(alone).main if job.attack == "screen"]
    assert [job.attacker for job in screens] == [OBLIVIOUS, ADAPTIVE]
    assert screens[0].settings(early_stop=True)["early_stop"]
    assert not screens[0].settings(early_stop=False)["early_stop"]


@pytest.mark.parametrize("random", [False, True])
def test_square_uses_outputs_only_which_revealing_does_not_change(random: bool):
    found = plan("square", {"random": random})
    assert (Attacker.ADAPTIVE in {job.attacker for job in found.distinct()}) == random


def test_parts_and_settings_repeat_the_attack():
    job = Job(attack="pgd", attacker=OBLIVIOUS, norm="linf", epsilon=8 / 255, steps=20)
    assert job.attacks(True) == {"pgd": PGD(epsilon=8 / 255, steps=20, early_stop=True)}
    settings = job.settings(early_stop=True)
    assert settings["step_size"] == pytest.approx(2.5 * 8 / 255 / 20)
    assert settings["steps"] == 20 and settings["early_stop"] and settings["random_start"]
    several = Job(attack="autoattack", attacker=OBLIVIOUS, norm="linf", epsilon=8 / 255)
    assert list(several.attacks(True)) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert several.settings(False)["attacks"][-1] == "square"


@pytest.mark.parametrize(
    ("attack", "changes", "message"),
    [
        ("autoatack", {}, r"'autoatack' \(nearest: autoattack\)"),
        ("cw", {}, "attacks: cw: .*l2"),
    ],
)
def test_impossible_attacks_are_refused_before_anything_runs(
    attack: str, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        plan(f"square {attack}", changes)


def test_a_model_without_gradients_is_attacked_by_square_and_transfer():
    found = plan("pgd", {"differentiable": False}, curves=True)
    assert [each.attack for each in found.main] == ["square", "square", "noise", "pgd"]
    assert not found.epsilon_curves
    dense = plan("pgd", HONEST | {"differentiable": False}, norm="l1-dense", curves=True)
    assert names(dense.main) == ["noise l1-dense 8/255 oblivious", "noise l1-dense 8/255 adaptive"]


def test_who_found_what_hides_the_gradient_attacks_with_it_and_draws_the_curves():
    planned = plan("pgd", FOUND | {"differentiable": False}, curves=True)
    assert [each.attacker for each in planned.main if each.attack == "pgd"] == [BPDA]
    assert list(planned.steps_curves) == [BPDA]


def test_square_tries_what_withstands_a_gradient_that_is_a_guess():
    last = plan("fgsm pgd", FOUND).main[-1]
    assert last.name == "square linf 8/255 adaptive-bpda" and last.on_survivors
    assert last.settings(early_stop=True)["queries"] == 500
    for others in (plan("autoattack", FOUND), plan("pgd square", FOUND), plan("pgd", HONEST)):
        assert not any(job.on_survivors for job in others.main)
    random = plan("pgd", FOUND | {"random": True})
    assert not any(job.attack == "square" for job in random.main)


def test_saturated_logits_get_a_loss_that_does_not_saturate():
    planned = plan("pgd", HONEST | {"saturates": True})
    losses = {each.attacker: each.loss for each in planned.distinct() if each.attack == "pgd"}
    assert losses == {OBLIVIOUS: "ce", ADAPTIVE: "bounded-ce"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"seed": -1}, "seed: expected at least 0, found -1"),
        ({"attacks": ()}, "expected at least one of each"),
        ({"epsilon": (8.0,)}, "for linf at most 1"),
        ({"epsilon": (0.12345671, 0.12345672)}, "that differ in the digits"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l1-dense"])
def test_unbounded_reaches_grey_from_black(norm: str):
    black = torch.zeros(1, 3, 8, 8)
    sizes = {"linf": float("inf"), "l2": 2, "l1": 1, "l1-dense": 1}
    distance = (0.5 - black).flatten().norm(p=sizes[norm]).item()
    assert unbounded(norm, 8) == pytest.approx(distance)
