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
    make_folder,
    median,
    print_table,
    python,
    run_command,
    seconds_per_unit,
    times_as_fast,
)

CLASSES, SIZE, FILE_SIZE = 100, 224, 256
FEW = micro_batch_size(SIZE)


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg; enlarged."""
    timm: Path
    """A checkout of timm, whose inference.py and package are measured."""
    more: int = 256
    """Images of the longer prediction beyond the shorter one's, one micro-batch."""
    workers: int = 0
    """Processes that read images in ours; 0 reads in a thread."""
    rounds: int = 3
    """How often each is measured."""


def make_weights(folder: Path) -> None:
    """Save one network as a checkpoint of ours and as timm's file of tensors."""
    torch.manual_seed(0)
    model = RobustClassifier(
        class_names=[str(label) for label in range(CLASSES)],
        backbone_args={"ls_init_value": 1.0},  # the default would mute blocks of random weights
    )
    head = model.get_submodule("backbone.head.fc")
    assert isinstance(head, nn.Linear)
    nn.init.normal_(head.weight)  # so that labels differ between images
    model.save_pretrained(folder / "ours")
    save_file(model.backbone.state_dict(), folder / "timm.safetensors")


def predict_ours(options: Options, folder: Path, images: Path) -> None:
    """Write ours.csv in `folder`."""
    files = ("--checkpoint", folder / "ours", "--images", images, "--out", folder / "ours.csv")
    run_command(python("inference/predict.py", *files, f"--num_workers={options.workers}"))


def predict_timm(options: Options, folder: Path, images: Path, more: str = "") -> None:
    """Write timm.csv in `folder`, with our micro-batch and timm's default workers."""
    flags = f"""
        --data-dir {images} --model convnext_tiny --num-classes {CLASSES}
        --checkpoint {folder / "timm.safetensors"} --model-kwargs ls_init_value=1.0
        --device {DEVICE.type} --batch-size {FEW} --input-size 3 {SIZE} {SIZE} --crop-pct 1.0
        --workers 2 --results-dir {folder} --results-file timm.csv --fullname --label-type none
        --include-index --no-console-results {more}
    """
    run_command([sys.executable, options.timm.resolve() / "inference.py", *flags.split()])


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
        few, more = (
            make_folder(options.images, folder / str(count), count, FILE_SIZE) / "train"
            for count in (FEW, FEW + options.more)
        )
        commands = {
            "ours": partial(predict_ours, options, folder),
            "timm": partial(predict_timm, options, folder),
            "timm --channels-last": partial(predict_timm, options, folder, more="--channels-last"),
        }
        works = {name: (partial(each, few), partial(each, more)) for name, each in commands.items()}
        seconds, start_up = seconds_per_unit(works, FEW, options.more, options.rounds)
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
