"""`evaluate` from Python: the command's numbers, no files, no global state changed."""

import copy
import json
import random
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from robust_submission import GCM, api, evaluate
from robust_submission.attacks import PGD
from robust_submission.cli.errors import UserError
from robust_submission.cli.numbers import SPACE
from robust_submission.data.images import resize_image
from robust_submission.data.sources import open_source
from robust_submission.evaluation.jobs import Attacker
from robust_submission.models.load import load_checkpoint
from robust_submission.report.schema import json_text, read_report
from tests.conftest import run_command

SAME = ("seed", "clean", "twin_clean", "oblivious", "adaptive", "measurements", "curves", "checks")
FEW = {"attacks": ("fgsm", "pgd"), "steps": 3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(GCM(), nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 4))


def labelled(model: nn.Module, count: int = 24) -> tuple[Tensor, Tensor]:
    """Images with the labels that the model gives them."""
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, model(images).argmax(1)


def test_the_numbers_are_the_commands(small_run: Path, few_digits: Path, tmp_path: Path):
    arguments = ("--data.name", "folder", "--data.root", few_digits, "--attacks", "fgsm,pgd")
    done = run_command(
        "inference/evaluate.py",
        *("--checkpoint", small_run, "--out", tmp_path / "report", "--steps", 3, *arguments),
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads((tmp_path / "report" / "report.json").read_text())
    source, model = open_source("folder", few_digits, "test"), load_checkpoint(small_run)
    side = model.image_size
    pixels = np.stack([resize_image(source.image(index), side) for index in range(len(source))])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert source.labels is not None
    for given in (images, images.float() / 255):
        found = json.loads(json_text(evaluate(model, given, source.labels.tolist(), **FEW)))
        assert {key: found[key] for key in SAME} == {key: expected[key] for key in SAME}
    assert found["model"]["digest"] == expected["model"]["digest"]


def global_state(model: nn.Module) -> list[Any]:
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        [part.training for part in model.modules()],
        [(weight.requires_grad, weight.grad) for weight in model.parameters()],
        [weight.is_contiguous() for weight in model.parameters()],
        torch.is_grad_enabled(),
    ]


def test_nothing_is_changed_and_no_file_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = network().train()
    images, labels = labelled(model)
    monkeypatch.chdir(tmp_path)
    before, pixels = global_state(model), images.clone()
    report = evaluate(model, images, labels, curves=False, **FEW)
    assert global_state(model) == before and torch.equal(images, pixels)
    assert not list(tmp_path.iterdir())
    assert report.verdict == "masked" and report.clean.value == 1
    assert report.adaptive.value < report.oblivious.value
    printed = repr(report).replace(SPACE, " ")
    assert printed.startswith("Report of Sequential on 24 images\nclean accuracy 100.0 %\n")


def test_a_folder_gets_the_report(tmp_path: Path):
    model = network()
    images, labels = labelled(model)
    names = ["a", "b", "c", "d"]
    report = evaluate(
        model, images, labels, out=tmp_path / "report", name="it", class_names=names, **FEW
    )
    assert json_text(read_report(tmp_path / "report")) == json_text(report)
    assert report.model["name"] == "it" and report.gallery[0].label in names
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.html", "report.json", "per_image.csv", "epsilon.png"} <= files
    assert ".journal" not in files


def test_corrupted_accuracy_is_that_of_a_model_that_reads_brightness(tmp_path: Path):
    """The corruption adds 0.1 per severity to grey images; above 0.5 they are of class 1."""
    greys = np.arange(10, 251, 10)
    images = torch.from_numpy(greys.astype(np.uint8))[:, None, None, None].repeat(1, 3, 8, 8)
    after = greys[:, None] + 25.5 * np.arange(6)  # by severity, 0 for clean
    right = (after > 127.5) == (greys > 127.5)[:, None]

    def brightness(x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)

    labels, out = (greys > 127.5).astype(int).tolist(), tmp_path / "report"
    report = evaluate(
        brightness,
        images,
        labels,
        attacks=["fgsm"],
        curves=False,
        corruptions=["brightness"],
        out=out,
    )
    assert report.corruptions is not None and report.clean.value == 1
    (found,) = report.corruptions.kinds
    assert [share.count for share in found.by_severity] == right[:, 1:].sum(axis=0).tolist()
    assert found.mean == report.corruptions.mean and found.mean.total == 25
    assert found.mean.value == pytest.approx(right[:, 1:].mean())
    assert found.mean.low < found.mean.value < found.mean.high
    assert report.auc == report.corrupted_auc == 1  # no order of two images changes
    table = pd.read_csv(out / "per_image.csv")
    assert table["corrupted"].tolist() == pytest.approx(right[:, 1:].mean(axis=1).tolist())


def test_two_classes_have_an_area_under_the_roc_curve():
    """As the share of pairs of both classes in which the second class has the higher score."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    images, _ = labelled(model)
    labels = torch.arange(24) % 2
    with torch.no_grad():
        score = model(images).diff(dim=1).flatten()
    pairs = score[labels == 1][:, None] > score[labels == 0]
    report = evaluate(model, images, labels, attacks=["fgsm"], curves=False)
    assert report.auc == pytest.approx(pairs.double().mean().item()) and 0.1 < report.auc < 0.9
    assert json.loads(json_text(report))["auc"] == report.auc and "ROC AUC" in repr(report)
    for others in (torch.ones(24, dtype=torch.int64), None):
        several = network()
        given = (model, images, others) if others is not None else (several, *labelled(several))
        report = evaluate(*given, attacks=["fgsm"], curves=False)
        assert report.auc is None and "auc" not in json.loads(json_text(report))


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path):
    model = network()
    images, labels = labelled(model)
    given = {"epsilon": np.array([8 / 255, 0.1], np.float32), "seed": np.int64(3), **FEW}
    names = np.array(["a", "b", "c", "d"])
    some = {"class_names": names, "curve_images": np.int64(9)}
    report = evaluate(model, images, labels, out=tmp_path, **some, **given)
    assert report.settings["epsilon"] == pytest.approx([8 / 255, 0.1]) and report.seed == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_autograd_mode_does_not_count(mode: type):
    inner = network()[1:]
    images, labels = labelled(inner)
    expected = evaluate(inner, images, labels, curves=False, **FEW)
    with mode():
        assert evaluate(inner, images, labels, curves=False, **FEW).adaptive == expected.adaptive


def test_batch_norm_in_training_mode_learns_nothing_from_an_evaluation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))
    model(torch.rand(9, 3, 8, 8))
    images, labels = labelled(model.eval())
    expected = evaluate(model, images, labels, curves=False, **FEW)
    found = evaluate(model.train(), images, labels, curves=False, **FEW)
    assert found.model["digest"] == expected.model["digest"] and found.clean.value == 1
    assert found.adaptive == expected.adaptive


def test_a_module_that_deepcopy_refuses():
    inner = network()[1:]
    images, labels = labelled(inner)
    expected = evaluate(inner, images, labels, curves=False, **FEW)
    whole = {"name": "weight", "amount": 0.0}  # nothing, but the weight is a result of autograd
    prune.l1_unstructured(last := copy.deepcopy(inner[3]), **whole)
    found = evaluate(nn.Sequential(*inner[:3], last), images, labels, curves=False, **FEW)
    assert found.adaptive == expected.adaptive
    vars(inner)["lock"] = Lock()
    with pytest.raises(ValueError, match="expected a module that can be copied, or a function"):
        evaluate(inner, images, labels, **FEW)
    found = evaluate(lambda each: inner(each), images, labels, curves=False, **FEW)
    assert found.adaptive == expected.adaptive


@pytest.mark.parametrize("kind", ["script", "trace", "load"])
def test_torchscript_is_evaluated_as_the_module_it_was_made_of(kind: str, tmp_path: Path):
    inner = network()[1:]
    images, labels = labelled(inner)
    made = torch.jit.trace(inner, images[:2]) if kind == "trace" else torch.jit.script(inner)
    if kind == "load":
        torch.jit.save(made, tmp_path / "it.pt")
        made = torch.jit.load(tmp_path / "it.pt")
    expected, found = (evaluate(each, images, labels, **FEW) for each in (inner, made))
    assert found.adaptive == expected.adaptive
    assert all(weight.requires_grad for weight in made.parameters())


def test_a_twin_of_other_classes_or_images_is_refused():
    model, twin = network(), network()[1:]
    images, labels = labelled(model)
    model.class_names, twin.class_names = list("abcd"), list("abdc")
    for size, message in (
        (8, "twin: expected the 4 classes .* in their order"),
        (9, "of 9, found 8"),
    ):
        twin.image_size = size
        with pytest.raises(UserError, match=message):
            evaluate(model, images, labels, twin=twin, **FEW)
    twin.class_names, twin.image_size = list("abcd"), 8
    report = evaluate(model, images, labels, twin=twin, curves=False, **FEW)
    assert report.twin_clean == report.clean


def test_a_model_may_need_two_images():
    inner = network()[1:]
    images, labels = labelled(inner)
    expected = evaluate(inner, images, labels, curves=False, attacks="fgsm")
    found = evaluate(lambda x: inner(x).squeeze(), images, labels, curves=False, attacks="fgsm")
    assert found.adaptive == expected.adaptive


def test_random_answers_without_a_gradient_are_attacked_by_queries():
    inner = network()[1:]
    images, labels = labelled(inner, 8)
    noisy = torch.no_grad()(lambda each: inner(each) + 0.01 * torch.randn(len(each), 4))
    given = {"epsilon": 0.5, "curves": False, "draws": 2, "eot": 2}
    report = evaluate(noisy, images, labels, attacks="square", **given)
    assert report.adaptive.value < report.clean.value


def test_a_callable_and_another_twin():
    model = network()
    images, labels = labelled(model)
    report = evaluate(lambda x: model(x), images, labels, twin=model[1:], curves=False, **FEW)
    assert report.twin_clean is not None and report.twin_clean.value > 0.9
    assert report.model["parameters"] is None
    assert [str(one) for one in report.attackers] == list(Attacker)  # its GCM is found unseen
    assert any("sin in gcm.py" in each for each in report.model["substituted"])
    assert report.verdict == "masked" and report.adaptive.value < report.oblivious.value


def test_without_gradients_there_is_no_sign_of_masking():
    model = network()
    images, labels = labelled(model)
    blind = torch.no_grad()(lambda x: model(x))
    report = evaluate(blind, images, labels, attacks=["square"], epsilon=0.2, twin=model)
    outcomes = {check.name: check.outcome for check in report.checks}
    names = ("finite gradients", "gradients there", "size of gradients", "gradients point uphill")
    assert [outcomes[name] for name in names] == ["not run"] * 4
    assert outcomes["differentiable"] == "warning" and report.verdict == "no sign of masking"
    assert "oblivious and adaptive agree" not in outcomes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(24, 8, 8, 3)}, r"images: expected shape \(N, 3, S, S\)"),
        ({"images": torch.full((24, 3, 8, 8), 255.0)}, "images: expected values from 0 to 1"),
        ({"images": torch.zeros(24, 3, 8, 8, dtype=torch.int64)}, "floating point or uint8"),
        ({"labels": torch.zeros(23)}, r"labels: expected shape \(24,\), found \(23,\)"),
        ({"labels": torch.full((24,), 4)}, "labels: expected 0 to 3, found 4 to 4"),
        ({"labels": torch.full((24,), 0.5)}, "labels: expected integers, found "),
        ({"labels": np.full(24, 4, np.uint16)}, "labels: expected 0 to 3, found 4 to 4"),
        ({"images": "photos"}, "images: expected a tensor or an array, found str"),
        ({"class_names": ["a", "b", "c", "d", "e"]}, "one logit for each of the data's 5 classes"),
        ({"attacks": ["pdg"]}, "nearest: pgd"),
        ({"attacks": [PGD()]}, r"attacks: expected some of fgsm, .*, found PGD\("),
        ({"attacks": PGD()}, r"attacks: expected some of fgsm, .*, found PGD\("),
        ({"corruptions": 3}, "corruptions: expected some of gaussian_noise, .*, found 3"),
        ({"corruptions": "frost"}, "corruptions: expected all, or some of gaussian_noise.*'frost'"),
        ({"model": nn.Linear(5, 3)}, "Linear: expected logits of images"),
        ({"norm": "Linf"}, "norm: expected linf, l2, l1, l1-dense, found Linf"),
        ({"epsilon": float("nan")}, "epsilon: expected a number, found nan"),
        ({"steps": 3.5}, "steps: expected a whole number, found 3.5"),
        ({"curve_images": 0}, "curve_images: expected at least 1, or None, found 0"),
    ],
)
def test_a_bad_argument_is_named(changes: dict[str, Any], message: str):
    model = network()
    images, labels = labelled(model)
    arguments = {"model": model, "images": images, "labels": labels} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments)


def test_arrays_and_half_precision_are_images_too():
    model = network()
    images, labels = labelled(model)
    images = images.bfloat16()
    options: dict[str, Any] = {"curves": False, "epsilon": 0.02}
    reports = [
        evaluate(model, images.float().numpy(), labels.double().numpy(), attacks="fgsm", **options),
        evaluate(model, images, labels.tolist(), attacks=["fgsm"], **options),
    ]
    assert json_text(reports[0]) == json_text(reports[1])


def test_a_model_that_mixes_images_is_not_cleared():
    model = network()[1:]
    images, labels = labelled(model)
    report = evaluate(lambda x: model(x - 0.3 * x.mean(0)), images, labels, curves=False, **FEW)
    assert (
        next(each for each in report.checks if each.name == "each image alone").outcome == "failed"
    )
    assert report.verdict == "evaluation failed" or report.adaptive.value <= 0.05


def test_processes_that_plan_other_attacks_are_stopped(monkeypatch: pytest.MonkeyPatch):
    model = network()
    monkeypatch.setattr(api, "from_all_processes", lambda _, objects: [*objects, "another plan"])
    with pytest.raises(ValueError, match="they plan other attacks; run it in one process"):
        evaluate(model, *labelled(model), **FEW)


def test_autoattack_on_unseeded_noise_and_the_numbers_of_its_draws():
    """Only images that the noise alone gets wrong in some draw differ in the worst of the draws."""
    inner = network()[1:]
    images, labels = labelled(inner, 12)

    def noisy(images: Tensor) -> Tensor:
        return inner(images + 0.02 * torch.randn_like(images))

    given = {"attacks": ("pgd", "autoattack"), "steps": 3, "epsilon": 0.01}
    report = evaluate(noisy, images, labels, **given)
    by_name = {one.name: one for one in report.measurements}
    rand = by_name["autoattack-rand linf 0.01 adaptive"]
    assert list(rand.settings["fooled_first_by"]) == ["apgd-ce", "apgd-dlr", "an earlier attack"]
    assert report.adaptive.value <= rand.robust_accuracy.value
    assert report.adaptive_worst_draw and report.adaptive_fixed
    assert report.adaptive_worst_draw.value <= min(report.adaptive.by_draw)
    assert report.settings["eot_on_curves"] == 2 and len(report.curves) == 4
    assert json_text(report) == json_text(evaluate(noisy, images, labels, **given))


def test_indicators_are_of_the_curves_images_that_are_right_when_clean(tmp_path: Path):
    model = network()[1:]
    images, labels = labelled(model)
    labels[::2] = (labels[::2] + 1) % 4
    report = evaluate(model, images, labels, **FEW, curve_images=9, out=tmp_path)
    table = pd.read_csv(tmp_path / "per_image.csv")
    names = ["noise fools", "loss still rising", "silent success", "fools view only"]
    known = table[[*names, "gradient cosine"]].notna()
    assert (known.sum() == report.curves[0].accuracy[0].count).all()  # right at epsilon 0
    assert not known[table["id"] % 2 == 0].any(axis=None)
    assert table["gradient cosine"].dropna().between(-1, 1).all()
