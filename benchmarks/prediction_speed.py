"""How fast is a prediction file, beside timm's inference.py?

    git clone https://github.com/huggingface/pytorch-image-models /tmp/timm
    python benchmarks/prediction_speed.py --images data/raw/cifar10 --timm /tmp/timm

Whole commands from a folder of JPEG files to the CSV file: ConvNeXt-Tiny at 224 pixels with the
same random weights (ours behind GCM, which timm has not). Each predicts few images and more; the
difference is the time of an image, and what is left of the shorter run is the start-up. All take
turns. The labels of both files are compared.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import nn

from photographs import make_folder
from robust_submission.cli.command import run
from robust_submission.data.loader import micro_batch_size
from robust_submission.models.classifier import RobustClassifier
from timing import (
    DEVICE,
    median,
    print_machine,
    print_table,
    python,
    run_command,
    seconds_per_unit,
    times_as_fast,
)

CLASSES = 100
SIZE = 224
FEW = micro_batch_size(SIZE)
ARGUMENTS = {"ls_init_value": 1.0}  # else blocks with random weights would do next to nothing


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg; enlarged."""
    timm: Path
    """A checkout of timm, whose inference.py and package are measured."""
    side: int = 256
    """Of the images in the JPEG files, which are squares."""
    more: int = 256
    """Images of the longer prediction beyond the shorter one's, one micro-batch."""
    workers: int = 0
    """Processes that read images in ours; 0 reads in a thread."""
    peer_workers: int = 2
    """The same in timm."""
    rounds: int = 3
    """How often each is measured."""


def make_weights(folder: Path) -> None:
    """Save one network as a checkpoint of ours and as timm's file of tensors."""
    torch.manual_seed(0)
    model = RobustClassifier(
        class_names=[str(label) for label in range(CLASSES)], backbone_args=ARGUMENTS
    )
    head = model.get_submodule("backbone.head.fc")
    assert isinstance(head, nn.Linear)
    nn.init.normal_(head.weight)  # so that labels differ from image to image
    model.save_pretrained(folder / "ours")
    save_file(model.backbone.state_dict(), folder / "timm.safetensors")


def predict_timm(options: Options, folder: Path, more: list[str], images: Path) -> None:
    """timm's command with as many images at a time as ours; to timm.csv in `folder`."""
    flags = f"""
        --data-dir {images} --model convnext_tiny --num-classes {CLASSES}
        --checkpoint {folder / "timm.safetensors"} --model-kwargs ls_init_value=1.0
        --device {DEVICE.type} --batch-size {FEW} --input-size 3 {SIZE} {SIZE}
        --crop-pct 1.0 --workers {options.peer_workers}
        --results-dir {folder} --results-file timm.csv --fullname --label-type none --include-index
        --no-console-results
    """
    script = options.timm.resolve() / "inference.py"
    run_command([sys.executable, script, *flags.split(), *more], cwd=folder)


def predict_ours(options: Options, folder: Path, images: Path) -> None:
    """This project's command, to ours.csv in `folder`."""
    files = ("--checkpoint", folder / "ours", "--images", images, "--out", folder / "ours.csv")
    run_command(python("inference/predict.py", *files, f"--num_workers={options.workers}"))


def agreement(folder: Path) -> str:
    """How many labels are alike in the last two files."""
    ours = pd.read_csv(folder / "ours.csv", index_col="image_id")["label"]
    timm = pd.read_csv(folder / "timm.csv", index_col="filename")["index"].reindex(ours.index)
    alike = (ours.to_numpy() == timm.to_numpy()).sum()
    return f"{alike} of {len(ours)} labels alike, {ours.nunique()} different ones"


def compare(options: Options) -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_weights(folder)
        few, more = (
            make_folder(options.images, folder / str(count), count, options.side) / "train"
            for count in (FEW, FEW + options.more)
        )
        contestants: dict[str, Callable[[Path], None]] = {
            "ours": partial(predict_ours, options, folder),
            "timm": partial(predict_timm, options, folder, []),
            "timm --channels-last": partial(predict_timm, options, folder, ["--channels-last"]),
        }
        works = {
            each: (partial(predict, few), partial(predict, more))
            for each, predict in contestants.items()
        }
        seconds, start_up = seconds_per_unit(works, FEW, options.more, options.rounds)
        alike = agreement(folder)
    rows = [
        [
            each,
            f"{1 / median(seconds, each):.1f}",
            f"{median(start_up, each):.1f}",
            "" if each == "ours" else times_as_fast(seconds, "ours", each),
        ]
        for each in seconds
    ]
    print_table(("command", "images/s", "start-up, s", "ours is times as fast"), rows)
    print_machine()
    print(f"{alike}.")


if __name__ == "__main__":
    run(compare, Options)
