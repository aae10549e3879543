"""A training step beside timm's train.py and a plain loop with torchattacks.

    git clone https://github.com/huggingface/pytorch-image-models /tmp/timm
    pip install --no-deps --target /tmp/peers -r benchmarks/requirements.txt
    python benchmarks/training_speed.py --images data/raw/cifar10 \\
        --timm /tmp/timm --peers /tmp/peers

Whole commands of one epoch: reading, augmentation and bookkeeping count. Peers do the same work:
model, images, batch, crops and flips, AdamW, clipped gradients, float32 on a CPU and bfloat16 on a
GPU. The model is not behind GCM, which no peer has.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from robust_submission.cli.command import Names, run
from robust_submission.cli.errors import UserError
from timing import (
    CLASSES,
    DEVICE,
    ON_CPU,
    ROOT,
    CommandOptions,
    Words,
    make_folder,
    median,
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


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained."""

    backbone: str = "convnext_tiny"
    backbone_args: dict[str, Any] = field(default_factory=lambda: {"patch_size": 2})
    image_size: int = 32
    batch_size: int = 64
    steps: int = 32
    """Additional steps of the longer run."""
    attacked: bool = False
    """Train on PGD-10 examples."""


ATTO = {"patch_size": 2, "kernel_sizes": 3}
SETTINGS = {
    "224": Setting(backbone_args={}, image_size=224, batch_size=16, steps=6),
    "32": Setting(),
    "pgd": Setting(attacked=True, steps=8),
    "pgd-atto": Setting(
        backbone="convnext_atto", backbone_args=ATTO, attacked=True, batch_size=128
    ),
}


@dataclass(kw_only=True)
class Options(CommandOptions):
    """What to measure."""

    timm: Path | None = None
    """A checkout of timm, whose train.py and package are measured."""
    peers: Path | None = None
    """The folder that benchmarks/requirements.txt is installed in."""
    settings: Names = Names("224,32,pgd,pgd-atto")
    """224, 32: ConvNeXt-Tiny at that many pixels (needs --timm); pgd, pgd-atto: PGD-10 training of
    ConvNeXt-Tiny and -Atto at 32 (needs --peers)."""
    workers: int = 0
    """Processes that read images in ours; 0 reads in a thread. The peers have two."""
    plain_loop: str | None = None
    """Only train the plain loop of this setting on `images`: used by the script itself."""

    def __post_init__(self) -> None:
        if unknown := set(self.settings) - set(SETTINGS):
            raise UserError(f"--settings: expected {', '.join(SETTINGS)}, found {min(unknown)}.")
        for name in self.settings:
            option = "peers" if SETTINGS[name].attacked else "timm"
            if getattr(self, option) is None:
                raise UserError(
                    f"--{option}: expected a folder for the setting {name}, found none."
                )


def train_ours(setting: Setting, options: Options, scratch: Path) -> Words:
    """This project's command without its images."""
    attacked, objective = setting.attacked, "--objective.name standard"
    if attacked:
        objective = f"""
            --objective.name adversarial --objective.epsilon {EPSILON}
            --objective.step_size {STEP_SIZE} --objective.steps {ATTACK_STEPS}
        """
    script = f"""
        training/train.py --output {scratch / "ours"} --overwrite true --epochs 1
        --batch_size {setting.batch_size}
        --mixed_precision {"no" if ON_CPU else "bf16"} --data.name folder
        --data.augmentation {"light" if attacked else "imagenet"}
        --data.num_workers {options.workers}
        --model.backbone {setting.backbone} --model.image_size {setting.image_size}
        --model.conceal false {objective} --optimizer.lr {LR} --optimizer.warmup_epochs 0
        --optimizer.weight_decay {WEIGHT_DECAY} --optimizer.clip_grad {CLIP_GRAD}
    """
    arguments = f"--model.backbone_args={json.dumps(setting.backbone_args)}"
    return python(script, "--trackers=", arguments)


def train_timm(setting: Setting, options: Options, scratch: Path) -> Words:
    """timm's command without its images."""
    assert options.timm is not None
    flags = f"""
        --train-split train --val-split val --device {DEVICE.type} --epochs 1 --warmup-epochs 0
        --model {setting.backbone} --num-classes {CLASSES} --batch-size {setting.batch_size}
        --input-size 3 {setting.image_size} {setting.image_size} --workers 2
        --opt adamw --lr {LR} --weight-decay {WEIGHT_DECAY} --clip-grad {CLIP_GRAD}
        --color-jitter 0 --train-interpolation bicubic --smoothing 0 --checkpoint-hist 1
        --experiment timm --output {scratch} {"" if ON_CPU else "--amp --amp-dtype bfloat16"}
    """
    model = [f"{name}={value}" for name, value in setting.backbone_args.items()]
    kwargs = ["--model-kwargs", *model] if model else []
    return [sys.executable, options.timm / "train.py", *flags.split(), *kwargs]


def train_plainly(setting: Setting, images: Path) -> None:
    """One epoch of PGD adversarial training as one writes it with torch and torchattacks."""
    import torchattacks  # pyright: ignore[reportMissingImports]
    from torchvision import datasets, transforms

    crop = transforms.RandomCrop(setting.image_size, padding=4, padding_mode="reflect")
    augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    loader = DataLoader(
        datasets.ImageFolder(str(images / "train"), augment),
        batch_size=setting.batch_size,
        shuffle=True,
        num_workers=2,
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


def train_peer(name: str, options: Options) -> Words:
    """The command of the plain loop without its images."""
    assert options.peers is not None
    peer_path = f"PYTHONPATH={options.peers.resolve()}:{ROOT}"
    return ["env", peer_path, sys.executable, __file__, f"--plain_loop={name}", "--settings="]


def measure(name: str, options: Options) -> list[list[str]]:
    """The rows of a setting, one per peer."""
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for steps in (FEW_STEPS, FEW_STEPS + setting.steps):
            count = steps * setting.batch_size
            make_folder(
                options.images,
                scratch / str(steps),
                count,
                256 if setting.image_size == 224 else 32,
            )
        commands = {"ours": [*train_ours(setting, options, scratch), "--data.root"]}
        if setting.attacked:
            commands["torchattacks"] = [*train_peer(name, options), "--images"]
        else:
            commands["timm"] = [*train_timm(setting, options, scratch), "--data-dir"]
            words = [*train_timm(setting, options, scratch), "--channels-last", "--data-dir"]
            commands["timm --channels-last"] = words
        works = {
            each: lambda steps, words=words: run_command(
                [*words, scratch / str(steps)], threads=torch.get_num_threads()
            )
            for each, words in commands.items()
        }
        seconds, _ = seconds_per_unit(works, FEW_STEPS, setting.steps, options.rounds)
    title = f"{setting.backbone}, {setting.image_size} px, batch {setting.batch_size}"
    return [
        [
            f"{'PGD-10, ' * setting.attacked}{title}",
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
        train_plainly(SETTINGS[options.plain_loop], options.images)
        return
    rows = [row for name in options.settings for row in measure(name, options)]
    print_table(("trained", "ours, s/step", "peer", "peer, s/step", "times as fast"), rows)


if __name__ == "__main__":
    run(compare, Options)
