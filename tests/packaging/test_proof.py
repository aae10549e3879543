"""A package that is not the checkpoint's, or breaks a rule, is never written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robust_submission.checker.host import Rules
from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint, save_trn
from robust_submission.models.trn import TRN
from robust_submission.packaging import export
from robust_submission.packaging.proof import proof_images, write_package
from tests.conftest import run_command

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
RULES = Rules(num_classes=3, image_size=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    names = ["a", "b", "c"]
    RobustClassifier(
        class_names=names, backbone="test_convnext", image_size=32, randomize={"min_size": 27}
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ending", ["zip", "onnx"])
def test_the_command_writes_what_check_accepts(ending: str, checkpoint: Path, tmp_path: Path):
    save_trn(TRN(width=4, depth=1, surrogate={"num_classes": 3, "widths": [8]}), tmp_path / "trn")
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    made_of = ("--checkpoint", checkpoint, "--trn", tmp_path / "trn", "--images", tmp_path)
    out = tmp_path / f"submission.{ending}"
    done = run_command("submission/package.py", *made_of, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"on 4 images of {tmp_path}" in done.stdout and "0.21 M parameters" in done.stdout
    done = run_command("submission/check.py", out, "--num_classes", 3, "--image_size", 32)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_that_differs_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "a.zip"
    out.write_text("former")
    text = export.MODEL_TEMPLATE.read_text()
    assert "images.float().flip(1)" in text
    (tmp_path / "model.py").write_text(text.replace("images.float().flip(1)", "images.float()"))
    monkeypatch.setattr(export, "MODEL_TEMPLATE", tmp_path / "model.py")
    with pytest.raises(UserError, match=r"expected the checkpoint's logits within 0\.0001"):
        write_package(load_checkpoint(checkpoint), out, PIXELS, RULES)
    assert out.read_text() == "former"


def test_a_package_beyond_the_budget_is_not_written(checkpoint: Path, tmp_path: Path):
    rules = Rules(num_classes=3, image_size=32, max_parameters=1e5)
    with pytest.raises(UserError, match=r"parameters: expected fewer than 0\.1 M, found 0\.21 M"):
        write_package(load_checkpoint(checkpoint), tmp_path / "a.zip", PIXELS, rules)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "message"),
    [("a.tar", "expected the ending .zip or .onnx"), ("none/a.zip", "existing folder")],
)
def test_where_it_goes_is_checked(checkpoint: Path, tmp_path: Path, out: str, message: str):
    with pytest.raises(UserError, match=message):
        write_package(load_checkpoint(checkpoint), tmp_path / out, PIXELS, RULES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--probabilities", "true"), "--probabilities: expected --profile codabench or hugging"),
        (("--profile", "codabench", "--memory", "1e9"), "--memory: expected --profile cvpr2022"),
    ],
)
def test_options_of_another_profile_are_refused(options: tuple[str, ...], message: str):
    done = run_command("submission/package.py", "--out", "a.zip", *options)
    assert done.returncode and message in done.stderr


def test_proof_images_are_spread_over_the_runs_training_images(small_run: Path, tmp_path: Path):
    pixels, description = proof_images(None, small_run, 5, 32)
    assert pixels.shape == (5, 32, 32, 3) and description == "training images of the run"
    noise, description = proof_images(None, tmp_path, 5, 48)
    assert noise.shape == (5, 48, 48, 3) and description.startswith("images of noise")
