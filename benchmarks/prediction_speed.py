"""Prediction beside timm's inference.py: images per second, from JPEG files to the CSV file.

    git clone https://github.com/huggingface/pytorch-image-models /tmp/timm
    python benchmarks/prediction_speed.py --images data/raw/cifar10 --timm /tmp/timm

Whole commands: ConvNeXt-Tiny at 224 pixels with the same random weights (ours behind GCM).
"""

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import nn

from robust_submission.cli.command import run
from robust_submission.data.loader import micro_batch_size
from robust_submission.models.classifier import RobustClassifier
from timing import (
    DEVICE,
    CommandOptions,
    make_folder,
    median,
    print_table,
    python,
    run_command,
    seconds_per_unit,
    times_as_fast,
)

NUM_CLASSES, SIZE, FILE_SIZE = 100, 224, 256
FEW, MORE = micro_batch_size(SIZE), 256


@dataclass(kw_only=True)
class Options(CommandOptions):
    """What to measure."""

    timm: Path
    """A checkout of timm, whose inference.py and package are measured."""


def make_weights(folder: Path) -> None:
    """Save one network as a checkpoint of ours and as timm's file of tensors."""
    torch.manual_seed(0)
    model = RobustClassifier(
        class_names=[str(label) for label in range(NUM_CLASSES)],
        backbone_args={"ls_init_value": 1.0},  # the default would mute blocks of random weights
    )
    head = model.get_submodule("backbone.head.fc")
    assert isinstance(head, nn.Linear)
    nn.init.normal_(head.weight)  # so that labels differ between images
    model.save_pretrained(folder / "ours")
    save_file(model.backbone.state_dict(), folder / "timm.safetensors")


def predict_ours(folder: Path, images: int) -> None:
    """Write ours.csv in `folder`."""
    files = f"--images {folder / str(images) / 'train'} --out {folder / 'ours.csv'}"
    run_command(python(f"inference/predict.py --checkpoint {folder / 'ours'} {files}"))


def predict_timm(options: Options, folder: Path, more: str, images: int) -> None:
    """Write timm.csv in `folder`, with our micro-batch and timm's default workers."""
    flags = f"""
        --data-dir {folder / str(images) / "train"} --model convnext_tiny
        --checkpoint {folder / "timm.safetensors"} --model-kwargs ls_init_value=1.0
        --num-classes {NUM_CLASSES} --workers 2
        --device {DEVICE.type} --batch-size {FEW} --input-size 3 {SIZE} {SIZE} --crop-pct 1.0
        --results-dir {folder} --results-file timm.csv --fullname --label-type none
        --include-index --no-console-results {more}
    """
    run_command([sys.executable, options.timm / "inference.py", *flags.split()])


def agreement(folder: Path) -> str:
    """How many labels agree in the two files."""
    ours = pd.read_csv(folder / "ours.csv", index_col="image_id")["label"]
    timm = pd.read_csv(folder / "timm.csv", index_col="filename")["index"].reindex(ours.index)
    alike = (ours.to_numpy() == timm.to_numpy()).sum()
    return f"{alike} of {len(ours)} labels agree; {ours.nunique()} different labels."


def compare(options: Options) -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_weights(folder)
        for count in (FEW, FEW + MORE):
            make_folder(options.images, folder / str(count), count, FILE_SIZE)
        commands = {
            "ours": partial(predict_ours, folder),
            "timm": partial(predict_timm, options, folder, ""),
            "timm --channels-last": partial(predict_timm, options, folder, "--channels-last"),
        }
        seconds, start_up = seconds_per_unit(commands, FEW, MORE, options.rounds)
        print(agreement(folder))
    rows = [
        [
            name,
            f"{1 / median(seconds, name):.1f}",
            f"{median(start_up, name):.1f}",
            times_as_fast(seconds, "ours", name),
        ]
        for name in seconds
    ]
    print_table(("command", "images/s", "start-up, s", "ours is times as fast"), rows)


if __name__ == "__main__":
    run(compare, Options)
