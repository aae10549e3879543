"""What is run, through which view, and what is not run twice."""

from typing import Any

import pytest
import torch
from torch import nn

from robust_submission.attacks import PGD
from robust_submission.evaluation.plan import Job, canonical, plan_jobs, unbounded
from robust_submission.evaluation.schema import Attacker
from robust_submission.evaluation.views import Target


def identity(images: torch.Tensor) -> torch.Tensor:
    return images


def target(**changes: Any) -> Target:
    values = {
        "name": "model",
        "model": identity,
        "revealed": nn.Identity(),
        "twin": nn.Identity(),
        "image_size": 32,
        "num_classes": 10,
        "random": False,
        "softmax": False,
        "differentiable": True,
    }
    return Target(**(values | changes))


HONEST = target(revealed=identity, twin=None)


def job(
    attack: str = "pgd", attacker: Attacker = Attacker.OBLIVIOUS, steps: int | None = 20
) -> Job:
    return Job(attack=attack, attacker=attacker, norm="linf", epsilon=8 / 255, steps=steps)


def names(jobs: list[Job]) -> list[str]:
    return [job.name for job in jobs]


def test_every_attack_runs_through_both_views_then_the_controls():
    plan = plan_jobs(("fgsm", "pgd"), "linf", (8 / 255, 0.1), 7, target(), curves=False)
    assert names(plan.main) == [
        "fgsm linf 8/255 oblivious",
        "fgsm linf 8/255 adaptive",
        "pgd-7 linf 8/255 oblivious",
        "pgd-7 linf 8/255 adaptive",
        "noise linf 8/255 oblivious",
        "pgd-7 linf 8/255 transfer",
        "fgsm linf 0.1 oblivious",
        "fgsm linf 0.1 adaptive",
        "pgd-7 linf 0.1 oblivious",
        "pgd-7 linf 0.1 adaptive",
        "noise linf 0.1 oblivious",
        "pgd-7 linf 0.1 transfer",
    ]
    assert not plan.epsilon_curves and not plan.steps_curves


def test_a_trn_is_also_attacked_past_it_by_what_follows_gradients():
    restoring = target(bypassed=nn.Identity())
    plan = plan_jobs(("pgd", "square"), "linf", (8 / 255,), 7, restoring, curves=True)
    assert names(plan.main) == [
        "pgd-7 linf 8/255 oblivious",
        "pgd-7 linf 8/255 adaptive",
        "pgd-7 linf 8/255 adaptive-bpda",
        "square linf 8/255 oblivious",
        "square linf 8/255 adaptive",
        "noise linf 8/255 oblivious",
        "pgd-7 linf 8/255 transfer",
    ]
    assert set(plan.steps_curves) == {Attacker.OBLIVIOUS, Attacker.ADAPTIVE}


def test_without_a_twin_nothing_is_transferred():
    plan = plan_jobs(("pgd",), "linf", (0.1,), 7, HONEST, curves=False)
    assert [each.attacker for each in plan.main] == ["oblivious", "adaptive", "oblivious"]


def test_curves_share_their_points_with_the_attacks_on_all_images():
    plan = plan_jobs(("pgd",), "linf", (8 / 255,), 20, target(), curves=True)
    adaptive = plan.epsilon_curves[Attacker.ADAPTIVE]
    multiples = [each.epsilon * 255 / 8 for each in adaptive]
    assert multiples == pytest.approx([0, 0.25, 0.5, 1, 2, 4, 0.5 * 255 / 8])
    assert [each.steps for each in plan.steps_curves[Attacker.ADAPTIVE]] == [1, 2, 5, 10, 20, 40]
    distinct = plan.distinct(target())
    assert distinct[job(attacker=Attacker.ADAPTIVE)] and distinct[job()]
    assert not distinct[adaptive[0]]
    assert len(distinct) == len({each.key for each in distinct})


def test_a_model_that_hides_nothing_is_attacked_once():
    revealed = job(attacker=Attacker.ADAPTIVE)
    assert canonical(revealed, HONEST) == job()
    assert canonical(revealed, target()) == revealed
    assert canonical(revealed, target(revealed=identity, random=True)) == revealed
    plan = plan_jobs(("fgsm", "pgd"), "linf", (0.1,), 5, HONEST, curves=True)
    assert {each.attacker for each in plan.distinct(HONEST)} == {Attacker.OBLIVIOUS}


def test_square_asks_for_outputs_alone_which_revealing_does_not_change():
    square = job("square", Attacker.ADAPTIVE, None)
    assert canonical(square, target()).attacker == Attacker.OBLIVIOUS
    assert canonical(square, target(random=True)).attacker == Attacker.ADAPTIVE


def test_early_stop_where_asked_and_possible():
    (pgd,) = job().attacks(early_stop=True).values()
    assert pgd == PGD(epsilon=8 / 255, steps=20, early_stop=True)
    (fgsm,) = job("fgsm", steps=None).attacks(early_stop=True).values()
    assert not fgsm.early_stop  # type: ignore[attr-defined]
    assert list(job("autoattack", steps=None).attacks(True)) == [
        "apgd-ce",
        "apgd-t",
        "fab-t",
        "square",
    ]


def test_settings_repeat_the_attack():
    settings = job().settings(early_stop=True)
    assert settings["step_size"] == pytest.approx(2.5 * 8 / 255 / 20)
    assert settings["steps"] == 20 and settings["early_stop"] and settings["random_start"]
    assert job("autoattack", steps=None).settings(False)["attacks"][-1] == "square"


@pytest.mark.parametrize(
    ("attack", "norm", "changes", "message"),
    [
        ("autoatack", "linf", {}, r"found 'autoatack' \(nearest: autoattack\)"),
        ("cw", "linf", {}, "--attacks cw: norm: expected one of l2"),
        ("pgd", "linf", {"differentiable": False}, "expected a model that autograd can"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    attack: str, norm: str, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        plan_jobs(("square", attack), norm, (0.1,), 5, target(**changes), curves=True)


def test_a_model_without_gradients_is_left_to_square_and_transfer():
    plan = plan_jobs(("square",), "linf", (0.1,), 5, target(differentiable=False), curves=True)
    assert [each.attack for each in plan.main] == ["square", "square", "noise", "pgd"]
    assert not plan.epsilon_curves


@pytest.mark.parametrize(("norm", "size"), [("linf", "51/255"), ("l2", "0.2"), ("l1", "0.2")])
def test_a_job_names_its_radius_as_the_page_does(norm: str, size: str):
    found = Job(attack="pgd", attacker=Attacker.TRANSFER, norm=norm, epsilon=0.2, steps=5)
    assert found.name == f"pgd-5 {norm} {size} transfer"


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l1-dense"])
def test_unbounded_reaches_grey_from_black(norm: str):
    black = torch.zeros(1, 3, 8, 8)
    sizes = {"linf": float("inf"), "l2": 2, "l1": 1, "l1-dense": 1}
    distance = (0.5 - black).flatten().norm(p=sizes[norm]).item()
    assert unbounded(norm, 8) == pytest.approx(distance)
