"""What do two processes of one thread give over one, and what would many GPUs, on paper?

    python benchmarks/scaling.py --images data/raw/cifar10 --checkpoint runs/cifar10_adversarial

Training, prediction and evaluation as whole commands, at two lengths: their difference over the
work between is the time of a step or an image, without start-up. One process on one core and two
on two take turns: left both cores, one process would read images on the other (`--pin false`).
The second table is computed, not measured: nothing here ran on several GPUs. `--commands ""` prints
it alone, `--assumptions.…` changes what it assumes.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from photographs import make_folder
from robust_submission.cli.command import Names, run
from robust_submission.models.classifier import RobustClassifier
from timing import (
    median,
    print_machine,
    print_table,
    python,
    run_command,
    seconds_per_unit,
    times_as_fast,
)

FEW_STEPS = 2
COMMANDS = ("training", "adversarial", "prediction", "evaluation")

Words = list[str | Path]


@dataclass(kw_only=True)
class Assumptions:
    """What the computed table stands on; the defaults are of H100s, eight a machine."""

    parameters: float = 28.6e6
    """Of ConvNeXt-Tiny with 1,000 classes; 27.9e6 with 100."""
    forward: float = 8.9e9
    """Operations of one image's forward pass: 4.46 G multiply-adds at 224 pixels."""
    batch_size: int = 128
    """Images a step on each GPU."""
    attack_steps: int = 10
    """Of PGD; each is one forward pass and one backward pass to the image alone."""
    peak: float = 989e12
    """Operations a second of a GPU: dense bfloat16."""
    utilisation: float = 0.35
    """Share of the peak that a step reaches."""
    per_machine: int = 8
    """GPUs of a machine."""
    inside: float = 450e9
    """Bytes a second that a GPU sends to the others of its machine (NVLink)."""
    between: float = 50e9
    """Bytes a second that a GPU sends to other machines (400 Gb/s InfiniBand)."""
    inside_latency: float = 2e-6
    """Seconds of each hop of a ring inside a machine."""
    between_latency: float = 5e-6
    """Seconds of each hop of a ring between machines."""
    bucket: float = 25 * 2**20
    """Bytes of gradients that DDP sums at once (torch's default)."""
    units: int = 18
    """Parts that FSDP shards one by one: the 18 blocks of ConvNeXt-Tiny."""
    overlap: float = 0.8
    """Share of the computation beside it that communication can hide behind."""


@dataclass(kw_only=True)
class Options:
    """What to measure, and to assume."""

    images: Path | None = None
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg."""
    checkpoint: Path | None = None
    """A run of CIFAR-10, which evaluation attacks."""
    commands: Names = Names(",".join(COMMANDS))
    """Those of training, adversarial (training), prediction and evaluation that are measured."""
    rounds: int = 3
    """How often each is measured."""
    backbone: str = "convnext_atto"
    """The timm model of training."""
    backbone_args: str = '{"patch_size": 2}'
    """Its further arguments, JSON."""
    image_size: int = 32
    """Side of the training images and their JPEG files."""
    batch_size: int = 128
    """Images of a training step, which the processes share."""
    steps: int = 100
    """More steps of the longer training; an eighth of it in adversarial training."""
    predicted: int = 256
    """More images of the longer prediction; a multiple of 64, so that two processes get alike."""
    evaluated: int = 2048
    """More images of the longer evaluation; a multiple of 256."""
    pin: bool = True
    """Give a process one core, by taskset, and two processes two."""
    assumptions: Assumptions = field(default_factory=Assumptions)
    """Of the computed table."""

    def __post_init__(self) -> None:
        if unknown := set(self.commands) - set(COMMANDS):
            raise ValueError(f"--commands: expected {', '.join(COMMANDS)}, found {min(unknown)}.")
        if self.commands and self.images is None:
            raise ValueError("--images: expected a folder, found none.")
        if "evaluation" in self.commands and self.checkpoint is None:
            raise ValueError("--checkpoint: expected a run for evaluation, found none.")
        least = 8 if "adversarial" in self.commands else 1
        if self.steps < least:
            raise ValueError(f"--steps: expected at least {least}, found {self.steps}.")


Work = Callable[[int, bool], object]
"""Runs a command with so many processes, the shorter or the longer one."""


def run_processes(words: Words, processes: int, pin: bool) -> None:
    """Run a command whose processes have a thread each and, where `pin` says so, a core each."""
    run_command(words, threads=1, cores=processes if pin else None)


def training(
    options: Options, scratch: Path, objective: str = "standard"
) -> tuple[str, int, int, Work]:
    """An epoch of the backbone on images in JPEG files; the processes share the same batches."""
    assert options.images is not None
    steps = options.steps if objective == "standard" else options.steps // 8
    batch_size, side = options.batch_size, options.image_size
    shorter, longer = (
        make_folder(options.images, scratch / str(number), batch_size * number, side)
        for number in (FEW_STEPS, FEW_STEPS + steps)
    )
    arguments = [
        *("--epochs=1", f"--batch_size={batch_size}", "--overwrite=true", "--trackers="),
        *("--data.name=folder", f"--model.image_size={side}"),
        f"--model.backbone={options.backbone}",
        f"--model.backbone_args={options.backbone_args}",
        *(f"--objective.name={objective}", "--objective.steps=10"),
    ]

    def work(processes: int, long: bool) -> None:
        data = f"--data.root={longer if long else shorter}"
        output = f"--output={scratch / 'run'}"
        command = python("training/train.py", *arguments, data, output, processes=processes)
        run_processes(command, processes, options.pin)

    attack = "" if objective == "standard" else ", PGD-10"
    title = f"training{attack}, {options.backbone}, {side} px; a step of {batch_size}"
    return title, FEW_STEPS, steps, work


def prediction(options: Options, scratch: Path) -> tuple[str, int, int, Work]:
    """ConvNeXt-Tiny with random weights at 224 pixels, on JPEG files of 256."""
    assert options.images is not None
    model, few = scratch / "model", 64
    images = make_folder(options.images, scratch / "jpeg", few + options.predicted, 256) / "train"
    classes = [str(label) for label in range(10)]
    RobustClassifier(class_names=classes, image_size=224).save_pretrained(model)
    arguments = ["--checkpoint", model, "--images", images, "--out", scratch / "sub.csv"]

    def work(processes: int, long: bool) -> None:
        limit = f"--limit={few + options.predicted if long else few}"
        command = python("inference/predict.py", *arguments, limit, processes=processes)
        run_processes(command, processes, options.pin)

    return "prediction, ConvNeXt-Tiny, 224 px; an image", few, options.predicted, work


def evaluation(options: Options, scratch: Path) -> tuple[str, int, int, Work]:
    """PGD-20 on the checkpoint, oblivious and adaptive, with noise and transfer."""
    assert options.images is not None and options.checkpoint is not None
    few = 256
    arguments: Words = [
        *("--checkpoint", options.checkpoint, "--data.name=folder", "--data.root", options.images),
        *("--attacks=pgd", "--steps=20", "--curves=false"),
    ]

    def work(processes: int, long: bool) -> None:
        limit = f"--limit={few + options.evaluated if long else few}"
        out = f"--out={scratch / 'report'}"
        command = python("inference/evaluate.py", *arguments, limit, out, processes=processes)
        run_processes(command, processes, options.pin)

    return "evaluation, PGD-20; an image", few, options.evaluated, work


def measure(name: str, options: Options) -> list[str]:
    """The row of a command."""
    plan = {
        "training": training,
        "adversarial": partial(training, objective="adversarial"),
        "prediction": prediction,
        "evaluation": evaluation,
    }[name]
    with tempfile.TemporaryDirectory() as folder:
        title, few, units, work = plan(options, Path(folder))
        pairs = {
            str(number): (partial(work, number, False), partial(work, number, True))
            for number in (1, 2)
        }
        seconds, _ = seconds_per_unit(pairs, few, units, options.rounds)
    one, two = (f"{median(seconds, number):.4f}" for number in ("1", "2"))
    return [title, one, two, times_as_fast(seconds, "2", "1")]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step on several GPUs, as the assumptions have it."""

    sent: float
    """Bytes that each GPU sends."""
    computing: float
    """Seconds of computation."""
    communicating: float
    """Seconds of communication."""
    exposed: float
    """Of these, the seconds that no computation hides."""


def model_step(assumed: Assumptions, gpus: int, *, attacked: bool, sharded: bool) -> Step:
    """What a step costs: a model, not a measurement.

    A training pass is three forward passes of work, each step of PGD two. DDP sums the gradients in
    two passes of a ring over float32 weights (scatter the sums, gather them), hidden by the
    backward pass of the update. FSDP gathers the weights before each forward and backward pass,
    those of the attack too, and scatters the sums; all of the computation hides it. What comes
    before the first or after the last computation is never hidden. A pass sends (P - 1) / P of the
    bytes from each of P GPUs: around the machine first, then each GPU's share of them between the
    machines. Rings make latency grow with P: an upper bound, as trees don't.
    """
    forwards = 3 + 2 * assumed.attack_steps * attacked
    seconds = assumed.batch_size * assumed.forward / (assumed.peak * assumed.utilisation)
    weights = 4 * assumed.parameters
    passes = 3 + 2 * assumed.attack_steps * attacked if sharded else 2
    messages = assumed.units if sharded else math.ceil(weights / assumed.bucket)
    near = min(gpus, assumed.per_machine)
    machines = gpus // near
    inside, between = weights * (near - 1) / near, weights * (machines - 1) / gpus
    latency = (near - 1) * assumed.inside_latency + (machines - 1) * assumed.between_latency
    one_pass = inside / assumed.inside + between / assumed.between + messages * latency
    hidden = assumed.overlap * seconds * (forwards if sharded else 2)
    return Step(
        sent=passes * (inside + between),
        computing=forwards * seconds,
        communicating=passes * one_pass,
        exposed=max(2 * one_pass / messages, passes * one_pass - hidden),
    )


def communication_table(assumed: Assumptions) -> None:
    """Print what a step costs on 8, 64 and 512 GPUs: a model, not a measurement."""
    columns = "objective,weights,GPUs,MB sent a GPU,computing ms,communicating ms,exposed ms"
    rows = list[list[str]]()
    cases = [(attacked, sharded) for attacked in (False, True) for sharded in (False, True)]
    for attacked, sharded in cases:
        for gpus in (8, 64, 512):
            step = model_step(assumed, gpus, attacked=attacked, sharded=sharded)
            whole = step.computing + step.exposed
            rows.append(
                [
                    f"PGD-{assumed.attack_steps}" if attacked else "standard",
                    "sharded (FSDP)" if sharded else "whole (DDP)",
                    str(gpus),
                    f"{step.sent / 1e6:.0f}",
                    *(f"{1e3 * s:.2f}" for s in (step.computing, step.communicating, step.exposed)),
                    f"{gpus * assumed.batch_size / whole:,.0f}",
                    f"{step.computing / whole:.3f}",
                ]
            )
    print("\nComputed, not measured; the assumptions are in `Assumptions`:\n")
    print_table([*columns.split(","), "images/s", "efficiency"], rows)


def compare(options: Options) -> None:
    """Measure the commands, print their table, then the computed one."""
    if options.commands:
        rows = [measure(name, options) for name in options.commands]
        columns = ("each with one thread", "1 process, s", "2 processes, s", "times as fast")
        print_table(columns, rows)
        print_machine()
    communication_table(options.assumptions)


if __name__ == "__main__":
    run(compare, Options)
