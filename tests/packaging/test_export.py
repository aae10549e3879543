"""A package gives its checkpoint's logits and gradients, and needs torch and numpy alone."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from ptflops import get_model_complexity_info
from safetensors.torch import load
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robust_submission.checker.sandbox import link_packages
from robust_submission.cli.command import parse
from robust_submission.cli.errors import UserError
from robust_submission.leaderboard.load import Submission, loaded_submission
from robust_submission.models.classifier import RobustClassifier, reveal, undefended
from robust_submission.models.trn import TRN
from robust_submission.packaging.config import package_config
from robust_submission.packaging.export import (
    STAGE_SOURCES,
    ChannelsReversed,
    write_onnx,
    write_zip,
    zip_files,
)
from robust_submission.training.recipe import TRNRecipe
from tests.conftest import ROOT

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SURROGATE = {"num_classes": 10, "widths": [8, 12], "depth": 1}
RANDOM = {"min_size": 27, "seed": 11}


def build(
    backbone: str = "test_convnext", trn: dict[str, object] | None = None, **options: object
) -> RobustClassifier:
    """A classifier whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    names = [str(digit) for digit in range(10)]
    model = RobustClassifier(class_names=names, backbone=backbone, image_size=32, **options)  # pyright: ignore[reportArgumentType]
    if trn is not None:
        model.attach_trn(TRN(**({"width": 8, "depth": 2} | trn)))  # pyright: ignore[reportArgumentType]
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim == 1 else 1.2 * parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=scale)
    return model.eval()


def packaged(model: RobustClassifier, folder: Path) -> tuple[Submission, nn.Module]:
    """The package, loaded here: for RGB images, and its `Model`."""
    write_zip(model, folder / "a.zip")
    with loaded_submission(folder / "a.zip", origin=model) as submission:
        assert isinstance(submission.model, ChannelsReversed)
        return submission, submission.model.model


def gradient(model: object, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images)[:, 0].sum(), images)[0]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [
        ("test_convnext", {"patch_size": 2, "act_layer": "silu"}),
        ("test_convnext", {"head_hidden_size": 24}),
        ("test_convnext", {"conv_bias": False, "ls_init_value": None, "drop_path_rate": 0.9}),
        ("test_convnext", {"use_grn": True, "conv_mlp": True, "stem_type": "overlap_act"}),
        ("test_convnext", {"head_norm_first": True, "conv_mlp": True, "act_layer": "relu"}),
        ("test_convnext3", {}),
        ("test_convnext", {"patch_size": 1, "depths": [0, 1, 1, 1]}),
        ("convnext_atto_ols", {}),
        ("convnext_atto_rms", {}),
        ("convnext_zepto_rms_ols", {}),
        ("convnextv2_atto", {}),
    ],
)
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_every_kind_of_convnext_agrees(
    backbone: str, arguments: dict[str, object], stem: str, tmp_path: Path
):
    model = build(backbone, backbone_args=arguments, stem=stem, randomize=RANDOM)
    submission, module = packaged(model, tmp_path)
    module.train()  # nobody promises to call eval()
    with torch.no_grad():
        expected, found = model(IMAGES), submission.model(IMAGES)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "trn",
    [
        {},
        {"surrogate": SURROGATE},
        {"streams": "image"},
        {"streams": "gradient", "estimator": "expected"},
        {"fusion": "concatenation", "estimator": "average", "top_k": 2, "stride": 3},
    ],
)
def test_every_view_of_a_package_with_a_trn_agrees(trn: dict[str, object], tmp_path: Path):
    model = build(trn=trn, conceal=False)
    sys.modules["trn"] = sys  # the name of a module of somebody else
    found, _ = packaged(model, tmp_path)
    assert sys.modules.pop("trn") is sys and "model" not in sys.modules
    for inference in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with inference():
            expected = model(IMAGES)
            torch.testing.assert_close(found.model(IMAGES), expected, rtol=0, atol=1e-5)
    assert found.twin is not None
    for view, its in ((found.revealed, model), (found.twin, undefended(model))):
        torch.testing.assert_close(view(IMAGES), its(IMAGES), rtol=0, atol=1e-5)
    for view, its in ((found.model, model), (found.revealed, reveal(model))):
        torch.testing.assert_close(
            gradient(view, IMAGES), gradient(its, IMAGES), rtol=1e-2, atol=1e-4
        )


def test_stages_and_their_draws_are_the_checkpoints(tmp_path: Path):
    model = build(randomize=RANDOM)
    submission, module = packaged(model, tmp_path)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.manual_seed(1)) / 255
    concealed = module.get_submodule("conceal")(pixels)
    assert torch.equal(concealed, model.conceal(pixels)) and not torch.equal(concealed, pixels)
    randomize = module.get_submodule("randomize")
    for draw in range(3):
        vars(randomize)["draw"] = vars(model.randomize)["draw"] = draw
        assert torch.equal(randomize(pixels), model.randomize(pixels))
    honest = gradient(model, pixels[:1])
    largest = honest.abs().max().item()
    assert largest > 1e6  # GCM's, not the identity's
    masked = gradient(submission.model, pixels[:1])
    torch.testing.assert_close(masked, honest, rtol=0, atol=1e-4 * largest)


def test_weights_of_half_precision_are_read(tmp_path: Path):
    model = build().to(torch.bfloat16)
    _, module = packaged(model, tmp_path)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.flatten(), model.get_parameter(name).float().flatten()), name


@pytest.mark.parametrize(
    ("backbone", "arguments", "found"),
    [
        ("resnet18", {}, "the backbone ResNet"),
        ("test_convnext", {"global_pool": "max"}, "global pooling by max"),
        ("test_convnext", {"output_stride": 16}, "dilated"),
        ("test_convnext", {"act_layer": "hard_swish"}, "the activation Hardswish"),
    ],
)
def test_what_it_cannot_rebuild_is_named(backbone: str, arguments: dict[str, str], found: str):
    with pytest.raises(UserError, match=rf"found .*{found}(.|\n)*need timm.*ONNX"):
        package_config(build(backbone, backbone_args=arguments))


def test_the_zip_holds_the_sources_and_is_the_same_each_time(tmp_path: Path):
    model = build(trn={})
    for name in ("a.zip", "b.zip"):
        write_zip(model, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = ["model.py", "config.json", *STAGE_SOURCES, "model.safetensors"]
        assert archive.namelist() == names
        models = ROOT / "robust_submission" / "models"
        assert all(archive.read(name) == (models / name).read_bytes() for name in STAGE_SOURCES)
        weights = load(archive.read("model.safetensors"))
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], each) for name, each in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.py", *STAGE_SOURCES])
def test_sources_are_of_python_3_9(name: str):
    text = zip_files(build())[name].decode()
    tree = ast.parse(text, feature_version=(3, 9))
    unions = [node for node in ast.walk(tree) if isinstance(node, ast.BitOr)]
    assert not unions or "from __future__ import annotations" in text
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.keyword) and node.arg == "strict")  # of zip
        for field in ("annotation", "returns"):  # not evaluated
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Constant(None))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.BitOr)]


PROGRAM = """
import importlib.util, sys
sys.path[:0] = sys.argv[1:3]
import numpy, torch
from model import Model
model = Model().float()
with torch.no_grad():
    logits = model(torch.from_numpy(numpy.load("images.npy")).flip(1))
numpy.save("logits.npy", logits.numpy())
others = ("timm", "safetensors", "torchvision", "huggingface_hub", "robust_submission")
assert not [name for name in others if importlib.util.find_spec(name)]
"""


def test_it_runs_where_torch_and_numpy_are_all_there_is(tmp_path: Path):
    model = build(trn={})
    write_zip(model, tmp_path / "a.zip")
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    (tmp_path / "only").mkdir()
    link_packages(tmp_path / "only", ["torch", "numpy"])
    shutil.unpack_archive(tmp_path / "a.zip", tmp_path / "content")
    words = [sys.executable, "-I", "-S", "-c", PROGRAM, tmp_path / "only", tmp_path / "content"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(IMAGES).numpy()
    assert expected.std() > 0.05
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"trn": {"surrogate": SURROGATE}},
        {"randomize": RANDOM},
        {"stem": "conv", "backbone_args": {"act_layer": "silu"}},
    ],
)
def test_onnx_gives_the_same_logits(options: dict[str, Any], tmp_path: Path):
    """Not both: where TRN rounds otherwise, an image gets another draw."""
    model = build(**options)
    write_onnx(model, tmp_path / "a.onnx")
    patches = np.random.default_rng(0).integers(0, 256, (200, 3, 2, 2)).astype(np.float32) / 255
    pixels = patches.repeat(16, axis=2).repeat(16, axis=3)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    found = np.asarray(session.run(None, {"images": pixels[:, ::-1]})[0])
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).numpy()
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_onnx_lacks_autograd(tmp_path: Path):
    with pytest.raises(UserError, match=r"\.onnx: expected a TRN with a surrogate"):
        write_onnx(build(trn={}), tmp_path / "a.onnx")


def multiply_adds(model: nn.Module) -> tuple[float, float]:
    """By ptflops, and by what torch runs."""
    operations, _ = get_model_complexity_info(
        model, (3, 224, 224), as_strings=False, print_per_layer_stat=False, verbose=False
    )
    assert isinstance(operations, float | int)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return operations, counter.get_total_flops() / 2


def test_convnext_tiny_with_gcm_and_a_trn_keeps_to_the_budget():
    """phase2_trn.yaml at 224 pixels and 100 classes: by ptflops, by torch, and TRN by hand."""
    path = ROOT / "training/recipes/phase2_trn.yaml"
    config = parse(TRNRecipe, ["--config", str(path)], default_config=path).trn
    assert config.surrogate is not None
    arguments = vars(config) | {"surrogate": {"num_classes": 100} | config.surrogate}
    del arguments["start"]
    model = RobustClassifier(class_names=[str(label) for label in range(100)]).eval()
    plain, _ = multiply_adds(model)
    model.attach_trn(TRN(**arguments))
    by_ptflops, by_torch = multiply_adds(model)
    width, depth, patch = config.width, config.depth, 3 * config.stride**2
    streams = 2 * (patch * width + depth * 18 * width**2) + depth * 4 * width**2
    trn = (224 // config.stride) ** 2 * (streams + 9 * 2 * width * patch)
    forward, patch = 0, 3 * config.surrogate["stride"] ** 2
    side = 224 // config.surrogate["stride"]
    for wide in config.surrogate["widths"]:
        forward += side**2 * (patch * wide + config.surrogate["depth"] * 18 * wide**2)
        patch, side = 4 * wide, side // 2
    by_hand = trn + 2 * forward
    assert 0.1e9 < 2 * forward < 0.4e9
    assert abs(by_ptflops + forward - plain - by_hand) < 0.03 * by_hand  # blind to transposes
    assert abs(by_torch - (plain + by_hand)) < 0.01 * plain
    assert max(plain + by_hand, by_torch) < 5e9
    assert sum(parameter.numel() for parameter in model.parameters()) < 30e6


def test_convnext_tiny_with_a_conv_stem_keeps_to_the_budget():
    names = [str(label) for label in range(100)]
    patch, conv = (RobustClassifier(class_names=names, stem=stem) for stem in ("patch", "conv"))
    more = 112**2 * 27 * 48 + 56**2 * 9 * 48 * 96 - 56**2 * 48 * 96  # convolutions, by hand
    (_, before), (by_ptflops, by_torch) = multiply_adds(patch.eval()), multiply_adds(conv.eval())
    assert by_torch - before == more
    assert max(by_ptflops, by_torch) < 5e9
    assert sum(parameter.numel() for parameter in conv.parameters()) < 30e6
