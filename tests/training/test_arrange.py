"""Compiling, channels last and checkpointing: the same model, computed in other ways."""

import copy
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.attacks.pgd import PGD
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from robust_submission.training.build import arrange_backbone, takes_graphs
from robust_submission.training.objectives import Trades
from robust_submission.training.recipe import ModelConfig, Recipe

IMAGES = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3


@pytest.fixture
def classifier() -> RobustClassifier:
    torch.manual_seed(0)
    return RobustClassifier(
        class_names=["a", "b", "c"],
        backbone="test_convnext",
        backbone_args={"depths": [1, 1, 1, 1]},
        image_size=32,
    )


def trained(classifier: RobustClassifier) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and weights of three steps with adversarial examples, and an average."""
    objective = Trades(attack=PGD(epsilon=2 / 255, steps=1))
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    average = ModelEmaV3(classifier, decay=0.5)
    losses = list[float]()
    for _ in range(3):
        chunk = (IMAGES, LABELS, torch.arange(8))
        loss = objective.loss(classifier.train(), objective.examples(classifier, chunk))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(classifier)
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(F.cross_entropy(average.module.eval()(IMAGES), LABELS).item())
    return losses, classifier.state_dict()


@pytest.mark.parametrize("option", ["channels_last", "gradient_checkpointing", "compile"])
def test_the_training_is_the_same(
    classifier: RobustClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
):
    # torch's own compiler of C++ takes more than a minute, and is not what is tested
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    other = copy.deepcopy(classifier)
    config = ModelConfig(
        compile=option == "compile",
        gradient_checkpointing=option == "gradient_checkpointing",
    )
    arrange_backbone(config, other.backbone, channels_last=option == "channels_last")
    (losses, weights), (other_losses, other_weights) = trained(classifier), trained(other)
    assert losses[0] > losses[2]
    torch.testing.assert_close(other_losses, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(other_weights), dict(weights), rtol=1e-3, atol=1e-4)
    other.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
    with torch.no_grad():
        loaded, own = load_checkpoint(tmp_path)(IMAGES), other.eval()(IMAGES)
    torch.testing.assert_close(loaded, own, rtol=1e-4, atol=1e-5)


def test_each_option_does_something(classifier: RobustClassifier):
    backbone = classifier.backbone
    config = ModelConfig(compile=True, gradient_checkpointing=True)
    arrange_backbone(config, backbone, channels_last=True)
    assert backbone._compiled_call_impl is not None
    assert backbone.get_parameter("stem.0.weight").is_contiguous(memory_format=torch.channels_last)
    assert all(stage.grad_checkpointing for stage in backbone.get_submodule("stages").children())
    assert copy.deepcopy(backbone)._compiled_call_impl is None  # an average is not compiled


def test_a_backbone_without_checkpointing_is_named():
    without = timm.create_model("inception_v3", num_classes=2)
    config = ModelConfig(backbone="inception_v3", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="that supports it, received inception_v3"):
        arrange_backbone(config, without, channels_last=False)


def test_a_trn_is_not_compiled(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.compile: expected false with a trn"):
        Recipe(model=ModelConfig(compile=True), trn=tmp_path)


@pytest.mark.parametrize(
    ("device", "processes", "settings", "graphs"),
    [
        ("cuda", 1, {}, True),
        ("cuda", 2, {}, False),
        ("cuda", 1, {"gradient_accumulation": 2}, False),
        ("cuda", 1, {"auto_batch_size": True}, False),
        ("cpu", 1, {}, False),
    ],
)
def test_cuda_graphs_are_of_one_gpu_whose_gradients_are_not_added_up(
    classifier: RobustClassifier,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    processes: int,
    settings: dict[str, Any],
    graphs: bool,
):
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    assert takes_graphs(Recipe(**settings), cast(Accelerator, accelerator)) == graphs
    modes = list[str | None]()
    monkeypatch.setattr(nn.Module, "compile", lambda _, mode: modes.append(mode))
    config = ModelConfig(compile=True)
    arrange_backbone(config, classifier.backbone, channels_last=False, graphs=graphs)
    assert modes == ["reduce-overhead" if graphs else None]
