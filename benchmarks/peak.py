"""How near does each kind of work come to the machine's peak?

    python benchmarks/peak.py

The peak is the best of matrix products, by torch.mm and as 1x1 convolutions (on a CPU these are two
libraries, MKL and oneDNN), in float32 on a CPU and bfloat16 on a GPU. A forward pass's operations
are counted by torch (a multiply-add is two). Each work runs with timm's network as it comes, as
predict.py and train.py compute it (`models.cpu`), and with `--compile` compiled too, on a
GPU as CUDA graphs; all take turns. Bookkeeping and data are left out. `--keep_memory false` shows
what it is worth that the commands here have glibc keep freed memory.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from robust_submission.attacks import PGD
from robust_submission.cli.command import run
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.runtime import keep_freed_memory
from timing import DEVICE, ON_CPU, median, print_table, take_turns, times_as_fast

NUM_CLASSES = 100
TINY, ATTO = "convnext_tiny", "convnext_atto"


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    rounds: int = 5
    """How often each is measured."""
    compile: bool = False
    """Also compiled (torch.compile); on a CPU it needs a C++ compiler."""
    keep_memory: bool = True
    """As the commands here do on a CPU."""


def predict(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    with torch.inference_mode():
        network.eval()(images)


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Loss and gradients of all weights; the update itself is small beside them."""
    network.train().requires_grad_().zero_grad()
    F.cross_entropy(network(images), labels).backward()


def attack(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    PGD(steps=10)(network.eval().requires_grad_(False), images, labels)


KINDS = {"prediction": (predict, 1), "training": (train, 3), "PGD-10": (attack, 20)}
"""How each is done, and its operations in forward passes: a backward pass to the images is one
more, one to the weights too is two."""


@dataclass(frozen=True)
class Work:
    """One kind of work on one batch of random images."""

    kind: str
    backbone: str
    image_size: int
    batch_size: int
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the backbone."""

    def __str__(self) -> str:
        return f"{self.kind}, {self.backbone}, {self.image_size} px, batch {self.batch_size}"

    def build(self, **options: Any) -> nn.Module:
        """The network with random weights, as timm makes it."""
        network = timm.create_model(
            self.backbone, num_classes=NUM_CLASSES, **self.arguments, **options
        )
        return network.to(DEVICE)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and labels (B,)."""
        images = torch.rand(self.batch_size, 3, self.image_size, self.image_size, device=DEVICE)
        return images, torch.arange(self.batch_size, device=DEVICE) % NUM_CLASSES


WORKS = (
    Work("prediction", TINY, 224, 32 if ON_CPU else 128),
    Work("training", TINY, 224, 16 if ON_CPU else 128),
    Work("PGD-10", ATTO, 32, 128 if ON_CPU else 1024, {"patch_size": 2, "kernel_sizes": 3}),
)


def memory(work: partial[None]) -> str:
    """GiB that a GPU has allocated at most, all networks' weights included; empty on a CPU."""
    if ON_CPU:
        return ""
    torch.accelerator.reset_peak_memory_stats()
    work()
    return f"{torch.accelerator.max_memory_allocated() / 2**30:.1f}"


def measure_peak(rounds: int) -> dict[str, float]:
    """FLOP/s of products of two square matrices of 8,192 (2,048 on a CPU), by name."""
    side, dtype = (2048, torch.float32) if ON_CPU else (8192, torch.bfloat16)
    left, right = torch.randn(2, side, side, device=DEVICE, dtype=dtype)
    image = left.T.reshape(1, side, -1, 32).to(memory_format=torch.channels_last)
    kernel = right[:, :, None, None]
    products = {
        "torch.mm": lambda: left @ right,
        "1x1 convolution": lambda: F.conv2d(image, kernel),
    }
    with torch.inference_mode():
        seconds = take_turns(products, rounds)
    return {name: 2 * side**3 / min(times) for name, times in seconds.items()}


def measure(work: Work, peak: float, options: Options) -> list[list[str]]:
    """A row for each way to compute."""
    images, labels = work.batch()
    torch.manual_seed(0)
    names = ("as it comes", "arranged", "compiled")[: 2 + options.compile]
    networks = {name: work.build() for name in names}
    for network in list(networks.values())[1:]:
        optimize_for_cpu(network, channels_last=ON_CPU)
    if options.compile:
        networks["compiled"].compile(mode=None if ON_CPU else "reduce-overhead")  # as train.py's
    once, passes = KINDS[work.kind]
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not ON_CPU):
        with FlopCounterMode(display=False) as counter:
            predict(networks["as it comes"], images, labels)
        works = {name: partial(once, each, images, labels) for name, each in networks.items()}
        seconds = take_turns(works, options.rounds)
        memories = {name: memory(each) for name, each in works.items()}
    total = passes * counter.get_total_flops()
    return [
        [
            f"{work}, {name}",
            f"{work.batch_size / median(seconds, name):.1f}",
            f"{total / median(seconds, name) / 1e9:.0f}",
            f"{100 * total / median(seconds, name) / peak:.0f} %",
            memories[name],
            "" if name == "as it comes" else times_as_fast(seconds, name, "as it comes"),
        ]
        for name in names
    ]


def compare(options: Options) -> None:
    """Measure the peak, then every work, and print the table."""
    if ON_CPU and options.keep_memory:
        keep_freed_memory()
    products = measure_peak(4 * options.rounds)
    peak = max(products.values())
    rows = [
        [name, "", f"{found / 1e9:.0f}", f"{100 * found / peak:.0f} %", "", ""]
        for name, found in products.items()
    ]
    rows += [row for work in WORKS for row in measure(work, peak, options)]
    print_table(("work", "images/s", "GFLOP/s", "of the peak", "GiB", "times as fast"), rows)


if __name__ == "__main__":
    run(compare, Options)
