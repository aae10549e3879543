"""A package with a TRN: plain torch restores as the checkpoint does, within the budget."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from ptflops import get_model_complexity_info
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robust_submission.cli.command import parse
from robust_submission.leaderboard.load import Origin, load_contestant
from robust_submission.models.checkpoint import save_trn
from robust_submission.models.classifier import RobustClassifier, reveal, undefended
from robust_submission.models.load import load_checkpoint
from robust_submission.models.trn import TRN
from robust_submission.packaging.export import ChannelsReversed, write_zip
from robust_submission.training.trn import TRNRecipe
from submission.package import Options, package
from tests.conftest import ROOT, run_command

SURROGATE = {"num_classes": 3, "widths": [8, 12], "depth": 1}
CHOICES = [
    {},
    {"surrogate": SURROGATE},
    {"streams": "image"},
    {"streams": "gradient", "estimator": "expected"},
    {"fusion": "concatenation", "estimator": "average", "top_k": 2, "stride": 3},
]
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(**options: object) -> RobustClassifier:
    torch.manual_seed(0)
    model = RobustClassifier(
        class_names=["a", "b", "c"], backbone="test_convnext", image_size=32, conceal=False
    )
    model.attach_trn(TRN(**({"width": 8, "depth": 2} | options)))  # pyright: ignore[reportArgumentType]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else 0.1)
    return model.eval()


def gradient(model: nn.Module | object, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images)[:, 0].sum(), images)[0]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("options", CHOICES)
def test_every_view_of_the_package_is_the_checkpoints(options: dict[str, object], tmp_path: Path):
    model = build(**options)
    model.save_pretrained(tmp_path / "run")
    write_zip(model, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == ["model.py", "model.safetensors", "trn.py"]
    origin = Origin(checkpoint=tmp_path / "run")
    found = load_contestant(tmp_path / "a.zip", tmp_path / "out", origin, None, trust=False)
    assert found.twin is not None
    for inference in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with inference():
            expected = model(IMAGES)
            torch.testing.assert_close(found.model(IMAGES), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.revealed(IMAGES), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.twin(IMAGES), undefended(model)(IMAGES), rtol=0, atol=1e-5)
    pairs = [(found.model, model), (found.revealed, reveal(model))]
    for view, its in pairs:
        torch.testing.assert_close(
            gradient(view, IMAGES), gradient(its, IMAGES), rtol=1e-2, atol=1e-4
        )


def test_two_packages_do_not_share_their_trn(tmp_path: Path):
    for name, options in (("one", {}), ("two", {"surrogate": SURROGATE})):
        model = build(**options)
        model.save_pretrained(tmp_path / name)
        write_zip(model, tmp_path / f"{name}.zip")
        sys.modules["trn"] = sys  # what another package left
        found = load_contestant(
            tmp_path / f"{name}.zip",
            tmp_path / f"{name}-out",
            Origin(checkpoint=tmp_path / name),
            None,
            trust=False,
        )
        torch.testing.assert_close(found.model(IMAGES), model(IMAGES), rtol=0, atol=1e-5)


def test_the_command_packs_a_classifier_with_a_trn(tmp_path: Path):
    RobustClassifier(
        class_names=["a", "b", "c"], backbone="test_convnext", image_size=32
    ).save_pretrained(tmp_path / "run")
    trn = build(surrogate=SURROGATE).restore
    assert isinstance(trn, TRN)
    save_trn(trn, tmp_path / "trn")
    options = ("--checkpoint", tmp_path / "run", "--trn", tmp_path / "trn", "--limit", 4)
    done = run_command("submission/package.py", *options, "--out", tmp_path / "a.zip")
    assert done.returncode == 0, done.stderr
    size = ("--num_classes", 3, "--image_size", 32)
    done = run_command("submission/check.py", tmp_path / "a.zip", *size)
    assert done.returncode == 0, done.stdout + done.stderr


def test_onnx_restores_with_a_surrogate_and_says_what_it_cannot(tmp_path: Path):
    model = build(surrogate=SURROGATE)
    model.save_pretrained(tmp_path / "run")
    package(Options(checkpoint=tmp_path / "run", out=tmp_path / "a.onnx", limit=4))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    found = np.asarray(session.run(None, {"images": IMAGES.numpy()})[0])
    with torch.no_grad():
        expected = ChannelsReversed(load_checkpoint(tmp_path / "run"))(IMAGES).numpy()
    assert np.abs(found - expected).max() < 1e-4
    build().save_pretrained(tmp_path / "other")
    for ending in ("onnx", "pt2"):
        with pytest.raises(ValueError, match="a TRN with a surrogate"):
            package(Options(checkpoint=tmp_path / "other", out=tmp_path / f"b.{ending}", limit=4))


def test_convnext_tiny_with_gcm_and_a_trn_keeps_to_the_budget():
    """phase2_trn.yaml at 224 pixels and 100 classes: by ptflops, and TRN by hand."""
    path = ROOT / "training/recipes/phase2_trn.yaml"
    config = parse(TRNRecipe, ["--config", str(path)], default_config=path).trn
    assert config.surrogate is not None
    arguments = vars(config) | {"surrogate": {"num_classes": 100} | config.surrogate}
    del arguments["start"]
    model = RobustClassifier(class_names=[str(label) for label in range(100)])
    plain, _ = get_model_complexity_info(
        model, (3, 224, 224), as_strings=False, print_per_layer_stat=False, verbose=False
    )
    model.attach_trn(TRN(**arguments))
    operations, parameters = get_model_complexity_info(
        model.eval(), (3, 224, 224), as_strings=False, print_per_layer_stat=False, verbose=False
    )
    width, positions = config.width, (224 // config.stride) ** 2
    streams = 2 * (3 * config.stride**2 * width + config.depth * 18 * width**2)
    fusion = config.depth * 4 * width**2
    head = 9 * 2 * width * 3 * config.stride**2
    surrogate, patch, places = (
        0,
        3 * config.surrogate["stride"] ** 2,
        224 // config.surrogate["stride"],
    )
    for wide in config.surrogate["widths"]:
        surrogate += places**2 * (patch * wide + config.surrogate["depth"] * 18 * wide**2)
        patch, places = 4 * wide, places // 2
    by_hand = positions * (streams + fusion + head) + 2 * surrogate
    assert isinstance(operations, float | int) and isinstance(plain, float | int)
    assert 0.1e9 < 2 * surrogate < 0.4e9
    assert abs(operations + surrogate - plain - by_hand) < 0.03 * by_hand  # blind to transposes
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert abs(counter.get_total_flops() / 2 - (plain + by_hand)) < 0.01 * plain
    assert plain + by_hand < 5e9 and counter.get_total_flops() / 2 < 5e9
    assert isinstance(parameters, float | int) and parameters < 30e6
