"""A package agrees with its checkpoint, needs torch and numpy alone, and is there whole or not."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch import nn

from inference.predict import Options as PredictOptions
from inference.predict import predict
from robust_submission.checker.sandbox import link_packages
from robust_submission.data.images import resize_image
from robust_submission.data.sources import open_source
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from robust_submission.packaging import export
from robust_submission.packaging.architecture import UnsupportedError, describe
from robust_submission.packaging.export import zip_members
from robust_submission.prediction.layout import plan_layout
from robust_submission.prediction.writer import Predictions, write_predictions
from submission.package import Options, package
from tests.conftest import run_command

# A sample of what timm's ConvNeXts are made of: plain, V2 with response norm, convolutional
# expansion, overlapping stem with an activation, other norms, norm before the pool.
BACKBONES = [
    ("test_convnext", {}),
    ("test_convnext", {"patch_size": 2}),
    ("test_convnext", {"head_hidden_size": 24}),
    ("test_convnext", {"conv_bias": False, "ls_init_value": None, "drop_path_rate": 0.5}),
    ("test_convnext", {"use_grn": True, "conv_mlp": True, "stem_type": "overlap_act"}),
    ("test_convnext", {"head_norm_first": True, "conv_mlp": True, "act_layer": "relu"}),
    ("test_convnext3", {}),
    ("convnext_atto_ols", {}),
    ("convnext_atto_rms", {}),
    ("convnext_zepto_rms_ols", {}),
    ("convnextv2_atto", {}),
]
RANDOM = {"min_size": 27, "seed": 11}


def shaken(model: RobustClassifier) -> RobustClassifier:
    """Weights large enough for every part to matter."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=scale)
    return model.eval()


def build(backbone: str = "test_convnext", **options: object) -> RobustClassifier:
    names = [str(digit) for digit in range(10)]
    return shaken(
        RobustClassifier(class_names=names, backbone=backbone, image_size=32, **options)  # pyright: ignore[reportArgumentType]
    )


def unpacked(model: RobustClassifier, folder: Path) -> nn.Module:
    """The package's Model, loaded here."""
    model.save_pretrained(folder)
    for name, content in zip_members(model).items():
        (folder / name).write_bytes(content)
    scope = {"__file__": str(folder / "model.py"), "__name__": "packaged"}
    exec((folder / "model.py").read_text(), scope)
    return scope["Model"]()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(("backbone", "arguments"), BACKBONES)
def test_every_kind_of_convnext_agrees(backbone: str, arguments: dict[str, object], tmp_path: Path):
    model = build(backbone, backbone_args=arguments, randomize=RANDOM)
    packaged = unpacked(model, tmp_path)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected, found = model(images), packaged(images.flip(1))
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_stages_and_their_draws_are_the_checkpoints(tmp_path: Path):
    model = build(randomize=RANDOM)
    packaged = unpacked(model, tmp_path)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.manual_seed(1)) / 255
    with torch.no_grad():
        assert torch.equal(packaged.conceal(pixels), model.conceal(pixels))
        assert not torch.equal(packaged.conceal(pixels), pixels)
        for draw in range(3):
            packaged.randomize.draw = model.randomize.draw = draw
            assert torch.equal(packaged.randomize(pixels), model.randomize(pixels))
    images = pixels[:1].requires_grad_()
    (honest,) = torch.autograd.grad(model(images).sum(), images)
    (through,) = torch.autograd.grad(packaged(images.flip(1)).sum(), images)
    largest = honest.abs().max().item()
    assert largest > 1e6  # GCM's, not the identity's
    torch.testing.assert_close(through, honest, rtol=0, atol=1e-4 * largest)


def test_train_and_eval_mode_are_the_same_and_parameters_train(tmp_path: Path):
    packaged = unpacked(build(backbone_args={"drop_path_rate": 0.9, "drop_rate": 0.9}), tmp_path)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert packaged.training and torch.equal(packaged(images), packaged.eval()(images))
    assert all(parameter.requires_grad for parameter in packaged.parameters())


def test_weights_of_half_precision_are_read(tmp_path: Path):
    model = build()
    packaged = unpacked(model.to(torch.bfloat16), tmp_path)
    for name, parameter in packaged.named_parameters():
        expected = model.get_parameter(name).float()
        assert torch.equal(parameter.flatten(), expected.flatten()), name


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
    with pytest.raises(UnsupportedError, match=found):
        describe(build(backbone, backbone_args=arguments))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 digits, tinted so that the order of channels matters."""
    folder, source = tmp_path_factory.mktemp("images"), open_source("digits", split="test")
    rng = np.random.default_rng(0)
    for index in range(40):
        tint = rng.uniform(0.3, 1, 3)
        Image.fromarray((source.image(index) * tint).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build(randomize=RANDOM).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """submission.zip, by the command."""
    out = tmp_path_factory.mktemp("packed") / "submission.zip"
    arguments = ("--checkpoint", checkpoint, "--images", images, "--out", out)
    done = run_command("submission/package.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "0.21 M parameters" in done.stdout and f"on 40 images of {images}" in done.stdout
    return out


def test_the_zip_holds_two_files_and_is_the_same_each_time(packed: Path, checkpoint: Path):
    with zipfile.ZipFile(packed) as archive:
        assert archive.namelist() == ["model.py", "model.safetensors"]
        model = load_checkpoint(checkpoint)
        packed_weights, weights = load(archive.read("model.safetensors")), model.state_dict()
        assert packed_weights.keys() == weights.keys()
        assert all(torch.equal(packed_weights[name], weights[name]) for name in weights)
        assert archive.read("model.py") == zip_members(model)["model.py"]
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


PROGRAM = """
import importlib.util, json, sys
sys.path[:0] = sys.argv[1:3]
import numpy, torch
from model import Model
model = Model().float()
pixels = numpy.load(sys.argv[3])[..., ::-1].copy()
images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
with torch.no_grad():
    logits = torch.cat([model(batch) for batch in images.split(32)])
ours = ("timm", "safetensors", "torchvision", "models", "submission", "PIL")
print(json.dumps([logits.argmax(1).tolist(), [importlib.util.find_spec(n) is None for n in ours]]))
"""


def test_its_prediction_file_is_predicts(
    packed: Path, checkpoint: Path, images: Path, tmp_path: Path
):
    """By a program that has torch and numpy alone, links in an otherwise empty folder."""

    from robust_submission.data.sources import open_source

    source = open_source("images", images)
    pixels = [resize_image(source.image(each), 32) for each in range(len(source))]
    np.save(tmp_path / "x.npy", np.stack(pixels))
    (tmp_path / "only").mkdir()
    link_packages(tmp_path / "only", ["torch", "numpy"])
    shutil.unpack_archive(packed, tmp_path / "content")
    words = [sys.executable, "-I", "-S", "-c", PROGRAM, tmp_path / "only", tmp_path / "content"]
    done = subprocess.run([*words, tmp_path / "x.npy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    labels, missing = json.loads(done.stdout)
    assert all(missing)
    names = source.ids.tolist()
    predictions = Predictions(images=names, labels=np.asarray(labels))
    layout = plan_layout("csv", names, [str(n) for n in range(10)])
    write_predictions(tmp_path / "packaged.csv", predictions, layout)
    predict(PredictOptions(out=tmp_path / "sub.csv", checkpoint=checkpoint, images=images))
    assert (tmp_path / "packaged.csv").read_bytes() == (tmp_path / "sub.csv").read_bytes()
    assert len(set(labels)) > 1


def test_onnx_and_zip_give_the_same_labels(checkpoint: Path, images: Path, tmp_path: Path):
    package(Options(checkpoint=checkpoint, images=images, out=tmp_path / "a.onnx", limit=8))
    model = load_checkpoint(checkpoint)
    patches = np.random.default_rng(0).integers(0, 256, (1000, 3, 2, 2)).astype(np.float32) / 255
    pixels = patches.repeat(16, axis=2).repeat(16, axis=3)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    found = np.asarray(session.run(None, {"images": pixels[:, ::-1]})[0])
    with torch.inference_mode():
        expected = unpacked(model, tmp_path)(torch.from_numpy(pixels[:, ::-1].copy())).numpy()
    assert np.abs(found - expected).max() < 1e-4
    assert (found.argmax(1) == expected.argmax(1)).all() and len(set(found.argmax(1))) > 1


def test_a_resnet_goes_by_onnx_alone(tmp_path: Path):
    build("resnet18").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the backbone ResNet(.|\n)*need timm.*ONNX"):
        package(Options(checkpoint=tmp_path, out=tmp_path / "a.zip"))
    assert not list(tmp_path.glob("*.zip"))


def test_a_package_that_differs_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "a.zip"
    out.write_text("former")
    text = (export.TEMPLATES / "model.py").read_text()
    assert "images.float().flip(1)" in text
    (tmp_path / "model.py").write_text(text.replace("images.float().flip(1)", "images.float()"))
    monkeypatch.setattr("robust_submission.packaging.export.TEMPLATES", tmp_path)
    with pytest.raises(ValueError, match=r"expected the checkpoint's logits within 0\.0001"):
        package(Options(checkpoint=checkpoint, out=out, limit=4))
    assert out.read_text() == "former"


def test_a_package_beyond_the_budget_is_not_written(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"parameters: expected fewer than 0\.1 M, found 0\.21 M"):
        package(Options(checkpoint=checkpoint, out=tmp_path / "a.zip", limit=4, max_parameters=1e5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "message"), [("a.tar", "expected the ending .zip"), ("none/a.zip", "existing folder")]
)
def test_bad_options(checkpoint: Path, tmp_path: Path, out: str, message: str):
    with pytest.raises(ValueError, match=message):
        package(Options(checkpoint=checkpoint, out=tmp_path / out))
