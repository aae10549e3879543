"""How fast is a training step, beside timm's train.py and a plain loop with torchattacks?

    git clone https://github.com/huggingface/pytorch-image-models /tmp/timm
    pip install --no-deps --target /tmp/peers -r benchmarks/requirements.txt
    python benchmarks/training_speed.py --images data/raw/cifar10 \\
        --timm /tmp/timm --peers /tmp/peers

Whole commands, so that reading, augmentation and bookkeeping count. Each trains one epoch, of few
steps and of more; the difference over the steps between is the time of a step, without start-up,
validation and saving. All take turns. Peers do the same work: model, images, batch, crops and
flips, AdamW, clipped gradients, float32 on a CPU and bfloat16 (autocast) on a GPU. The model is not
behind GCM, which no peer has.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from photographs import CLASSES, make_folder
from robust_submission.cli.command import Names, run
from timing import (
    DEVICE,
    ON_CPU,
    ROOT,
    median,
    print_machine,
    print_table,
    python,
    run_command,
    seconds_per_unit,
    times_as_fast,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LR, WEIGHT_DECAY, CLIP_GRAD = 5e-4, 0.05, 1.0
EPSILON, STEP_SIZE, ATTACK_STEPS = 8 / 255, 2 / 255, 10
FEW_STEPS = 2

Words = list[str | Path]
Contestants = dict[str, Callable[[Path], object]]
"""What each does, given the folder of images to train on."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained."""

    backbone: str
    """A timm model."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Its further arguments."""
    image_size: int = 32
    """Side of the model's images."""
    file_size: int = 32
    """Side of the images in the JPEG files."""
    attacked: bool = False
    """Train on PGD examples."""


SETTINGS = {
    "224": Setting(backbone="convnext_tiny", image_size=224, file_size=256),
    "32": Setting(backbone="convnext_tiny", backbone_args={"patch_size": 2}),
    "pgd": Setting(backbone="convnext_tiny", backbone_args={"patch_size": 2}, attacked=True),
    "pgd-atto": Setting(
        backbone="convnext_atto",
        backbone_args={"patch_size": 2, "kernel_sizes": 3},
        attacked=True,
    ),
}


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg."""
    timm: Path | None = None
    """A checkout of timm, whose train.py and package are measured."""
    peers: Path | None = None
    """The folder that benchmarks/requirements.txt is installed in."""
    settings: Names = Names("224,32,pgd,pgd-atto")
    """224, 32: ConvNeXt-Tiny at so many pixels; pgd, pgd-atto: PGD-10 training of ConvNeXt-Tiny and
    -Atto at 32."""
    rounds: int = 3
    """How often each is measured."""
    steps: int = 16
    """More steps of the longer run at 224 pixels."""
    small_steps: int = 32
    """The same at 32 pixels."""
    batch_size: int = 16
    """Images a step at 224 pixels."""
    small_batch_size: int = 128
    """The same at 32 pixels."""
    workers: int = 0
    """Processes that read images in ours; 0 reads in a thread."""
    peer_workers: int = 2
    """Processes that read images in the peers."""
    processes: int = 1
    """Processes of ours, which share the images of a step and the cores; the peers have one."""
    compile: bool = False
    """Ours with model.compile, which needs a C++ compiler."""
    plain_loop: str | None = None
    """Train the plain loop of this setting on `images`, and no more: what the script starts."""

    def __post_init__(self) -> None:
        if unknown := set(self.settings) - set(SETTINGS):
            raise ValueError(f"--settings: expected {', '.join(SETTINGS)}, found {min(unknown)}.")
        standard = [name for name in self.settings if not SETTINGS[name].attacked]
        if standard and self.timm is None:
            raise ValueError(f"--timm: expected a checkout for {', '.join(standard)}, found none.")
        attacked = [name for name in self.settings if SETTINGS[name].attacked]
        if attacked and self.peers is None:
            raise ValueError(f"--peers: expected a folder for {', '.join(attacked)}, found none.")


def train_ours(setting: Setting, options: Options, batch_size: int, scratch: Path) -> Words:
    """This project's command, but for its images."""
    keys: dict[str, object] = {
        "output": scratch / "ours",
        "overwrite": "true",
        "epochs": 1,
        "batch_size": batch_size,
        "trackers": "",
        "mixed_precision": "no" if ON_CPU else "bf16",
        "data.name": "folder",
        "data.augmentation": "light" if setting.attacked else "imagenet",
        "data.num_workers": options.workers,
        "model.backbone": setting.backbone,
        "model.backbone_args": json.dumps(setting.backbone_args),
        "model.image_size": setting.image_size,
        "model.conceal": "false",
        "model.compile": str(options.compile).lower(),
        "objective.name": "adversarial" if setting.attacked else "standard",
        "objective.epsilon": EPSILON,
        "objective.step_size": STEP_SIZE,
        "objective.steps": ATTACK_STEPS,
        "optimizer.lr": LR,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "optimizer.clip_grad": CLIP_GRAD,
        "optimizer.warmup_epochs": 0,
    }
    arguments = [f"--{name}={value}" for name, value in keys.items()]
    return python("training/train.py", *arguments, processes=options.processes)


def train_timm(setting: Setting, options: Options, batch_size: int, scratch: Path) -> Words:
    """The command of timm's checkout, but for its images."""
    assert options.timm is not None
    flags = f"""
        --train-split train --val-split val --device {DEVICE.type} --epochs 1 --warmup-epochs 0
        --model {setting.backbone} --num-classes {CLASSES} --batch-size {batch_size}
        --input-size 3 {setting.image_size} {setting.image_size} --workers {options.peer_workers}
        --opt adamw --lr {LR} --weight-decay {WEIGHT_DECAY} --clip-grad {CLIP_GRAD}
        --color-jitter 0 --train-interpolation bicubic --smoothing 0 --checkpoint-hist 1
        --experiment timm --output {scratch} {"" if ON_CPU else "--amp --amp-dtype bfloat16"}
    """
    model = [f"{name}={value}" for name, value in setting.backbone_args.items()]
    kwargs = ["--model-kwargs", *model] if model else []
    script = options.timm.resolve() / "train.py"
    return ["env", "-u", "PYTHONPATH", sys.executable, script, *flags.split(), *kwargs]


def train_plain(name: str, options: Options, batch_size: int) -> Words:
    """The command of the plain loop, but for its images."""
    assert options.peers is not None
    return [
        *("env", f"PYTHONPATH={options.peers.resolve()}", sys.executable, Path(__file__)),
        *(f"--plain_loop={name}", "--settings=", f"--small_batch_size={batch_size}"),
        f"--peer_workers={options.peer_workers}",
    ]


def train_plainly(setting: Setting, options: Options) -> None:
    """PGD adversarial training as one writes it: torchattacks in a loop of torch, one epoch."""
    import torchattacks  # pyright: ignore[reportMissingImports]
    from torchvision import datasets, transforms

    crop = transforms.RandomCrop(setting.image_size, padding=4, padding_mode="reflect")
    augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    loader = DataLoader(
        datasets.ImageFolder(str(options.images / "train"), augment),
        batch_size=options.small_batch_size,
        shuffle=True,
        num_workers=options.peer_workers,
        pin_memory=not ON_CPU,
        drop_last=True,
    )
    backbone = timm.create_model(setting.backbone, num_classes=CLASSES, **setting.backbone_args)
    model = nn.Sequential(transforms.Normalize(MEAN, STD), backbone).to(DEVICE)
    attack = torchattacks.PGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=ATTACK_STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for batch in loader:
        images, labels = (each.to(DEVICE, non_blocking=True) for each in batch)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not ON_CPU):
            loss = F.cross_entropy(model(attack(images, labels)), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()


def contestants(name: str, options: Options, batch_size: int, scratch: Path) -> Contestants:
    """Ours, then its peers: each trains on the images of a folder."""
    setting = SETTINGS[name]
    ours = train_ours(setting, options, batch_size, scratch)
    threads = max(torch.get_num_threads() // options.processes, 1)
    found: Contestants = {
        "ours": lambda images: run_command(
            [*ours, f"--data.root={images}"], threads=threads, cwd=ROOT
        )
    }
    if setting.attacked:
        plain = train_plain(name, options, batch_size)
        found["torchattacks"] = lambda images: run_command([*plain, f"--images={images}"])
        return found
    words = train_timm(setting, options, batch_size, scratch)
    for peer, more in (("timm", []), ("timm --channels-last", ["--channels-last"])):
        found[peer] = lambda images, more=more: run_command(
            [*words, *more, "--data-dir", images], cwd=scratch
        )
    return found


def measure(name: str, options: Options) -> list[list[str]]:
    """The rows of a setting, one a peer."""
    setting = SETTINGS[name]
    large = setting.image_size > 32
    steps = options.steps if large else options.small_steps
    batch_size = options.batch_size if large else options.small_batch_size
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        few, more = (
            make_folder(options.images, scratch / str(count), count * batch_size, setting.file_size)
            for count in (FEW_STEPS, FEW_STEPS + steps)
        )
        trainings = contestants(name, options, batch_size, scratch)
        pairs = {
            each: (partial(train, few), partial(train, more)) for each, train in trainings.items()
        }
        if options.compile:
            trainings["ours"](few)  # leaves its compiled code on disk, which the measured runs load
        seconds, _ = seconds_per_unit(pairs, FEW_STEPS, steps, options.rounds)
    title = f"{'PGD-10, ' if setting.attacked else ''}{setting.backbone}, {setting.image_size} px"
    return [
        [
            f"{title}, batch {batch_size}",
            f"{median(seconds, 'ours'):.3f}",
            peer,
            f"{median(seconds, peer):.3f}",
            times_as_fast(seconds, "ours", peer),
        ]
        for peer in list(seconds)[1:]
    ]


def compare(options: Options) -> None:
    """Measure every setting and print the table."""
    if options.plain_loop:
        train_plainly(SETTINGS[options.plain_loop], options)
        return
    rows = [row for name in options.settings for row in measure(name, options)]
    print_table(("trained", "ours, s/step", "peer", "peer, s/step", "times as fast"), rows)
    print_machine()
    if options.timm:
        version = (options.timm / "timm" / "version.py").read_text().split("'")[1]
        print(f"timm's checkout: {version}.")
    print(f"Ours with --processes {options.processes} --compile {str(options.compile).lower()}.")


if __name__ == "__main__":
    run(compare, Options)
