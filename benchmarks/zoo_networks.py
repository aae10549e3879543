"""The networks of the zoo: small CIFAR-10 classifiers, trained once and kept as safetensors.

    Networks(Path("data/raw/cifar10"), Path("runs/zoo"))("natural")

Trained on 4,000 to 8,000 images of CIFAR-10 (JPEG), for one to four minutes each on one CPU core.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cifar10_resnet18 import vanilla
from robust_submission.attacks import FFGSM, PGD, Attack
from robust_submission.cli.files import atomic_write
from robust_submission.data.sources import open_source, stratified_subset
from zoo_defences import Thermometer, Transform, WinnersTakeAll

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
CLASSES = 10
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
BLUR = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
CODE = Thermometer(levels=10).to(DEVICE)


class Scale(nn.Module):
    """Pixels from 0 to 1 become about -2 to 2."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 4 - 2


class Block(nn.Module):
    """Two convolutions beside a shortcut; the image shrinks by `stride`."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.first = nn.Sequential(*convolution(inputs, outputs, stride), activation())
        self.second = nn.Sequential(*convolution(outputs, outputs))
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            pool = nn.AvgPool2d(stride)
            self.shortcut = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False))
        self.activation = activation()

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.second(self.first(features)) + self.shortcut(features))


def convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """A 3x3 convolution and its batch norm."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return layer, nn.BatchNorm2d(outputs)


def small_resnet(
    width: int = 24, channels: int = 3, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Seven convolutions: images (B, channels, 32, 32), 0 to 1, to logits (B, 10).

    Its parts are scale, stem, three blocks, pool, flatten, head; a defence can go between them.
    """
    return nn.Sequential(
        Scale(),
        nn.Sequential(*convolution(channels, width), activation()),
        Block(width, width, 2, activation),
        Block(width, 2 * width, 2, activation),
        Block(2 * width, 2 * width, 1, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


def noisy(images: Tensor) -> Tensor:
    """Images with Gaussian noise."""
    return images + 0.12 * torch.randn_like(images)


def natural_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    front: Transform | None = None,
    smoothing: float = 0,
) -> Tensor:
    """Cross-entropy, on the images as `front` passes them on."""
    images = front(images) if front else images
    return F.cross_entropy(model(images), labels, label_smoothing=smoothing)


def _attacked(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Adversarial images, made in eval mode with a random start from the global generator."""
    model.eval()
    seed = int(torch.randint(2**31, ()))
    adversarial = attack(model, images, labels, torch.Generator().manual_seed(seed))
    model.train()
    return adversarial


def adversarial_loss(model: nn.Module, images: Tensor, labels: Tensor, *, attack: Attack) -> Tensor:
    """Cross-entropy on adversarial images alone (Madry et al. 2018)."""
    return F.cross_entropy(model(_attacked(attack, model, images, labels)), labels)


def trades_loss(
    model: nn.Module, images: Tensor, labels: Tensor, *, attack: Attack, beta: float = 4
) -> Tensor:
    """Clean cross-entropy plus divergence of attacked from clean predictions, after TRADES."""
    adversarial = _attacked(attack, model, images, labels)
    clean, attacked = model(torch.cat([images, adversarial])).chunk(2)
    divergence = F.kl_div(
        attacked.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True
    )
    return F.cross_entropy(clean, labels) + beta * divergence


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained."""

    build: Callable[[], nn.Module] = small_resnet
    loss: Loss = natural_loss
    epochs: int = 10
    images: int = 8000
    lr: float = 0.1
    seed: int = 0
    start: str | None = None
    """The network whose weights it starts from, where names and shapes agree."""


def tuned(loss: Callable[..., Tensor], **changes: Any) -> Recipe:
    """A few epochs from the natural network; what is no field of the recipe goes to the loss."""
    options = {"epochs": 4, "images": 4000, "lr": 0.05, "start": "natural"} | changes
    arguments = {name: options.pop(name) for name in list(options) if name not in _FIELDS}
    return Recipe(loss=partial(loss, **arguments), **options)


_FIELDS = [each.name for each in fields(Recipe)]
RECIPES: dict[str, Recipe] = {
    "natural": Recipe(),
    "second": Recipe(seed=1, epochs=6),
    "small": Recipe(build=partial(small_resnet, 12)),
    "natural-16": Recipe(build=partial(small_resnet, 16), epochs=5, images=6000),
    "label-smoothing": tuned(natural_loss, smoothing=0.1),
    "blur": tuned(natural_loss, front=BLUR),
    "noise": tuned(natural_loss, front=noisy),
    "thermometer": tuned(
        natural_loss, front=CODE, build=partial(small_resnet, channels=3 * CODE.levels)
    ),
    "k-wta": tuned(natural_loss, build=partial(small_resnet, activation=WinnersTakeAll)),
    "fgsm": tuned(adversarial_loss, attack=FFGSM(epsilon=8 / 255), epochs=6),
    "fgsm-16": Recipe(
        build=partial(small_resnet, 16),
        loss=partial(adversarial_loss, attack=FFGSM(epsilon=8 / 255)),
        epochs=6,
        images=6000,
        seed=1,
        start="natural-16",
    ),
    "pgd-4": tuned(adversarial_loss, attack=PGD(epsilon=4 / 255, steps=3), epochs=6),
    "pgd-8": tuned(
        adversarial_loss,
        attack=PGD(epsilon=8 / 255, steps=3),
        epochs=10,
        images=8000,
        lr=0.1,
    ),
    "trades": tuned(trades_loss, attack=PGD(epsilon=8 / 255, steps=3), epochs=6),
}


def read_images(folder: Path, split: str, limit: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32), uint8, and labels (N,) of class folders, stratified by class."""
    source = open_source("folder", folder, split)
    assert source.labels is not None
    chosen = stratified_subset(source.labels, limit, seed)
    pixels = np.stack([source.image(int(index)) for index in chosen])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(source.labels[chosen])


def augmented_batches(
    images: Tensor, labels: Tensor, batch_size: int = 128
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, 0 to 1; half of the images flipped, all shifted by up to 2."""
    for rows in torch.randperm(len(images)).split(batch_size):
        if len(rows) < batch_size:
            return
        batch = images[rows].float() / 255
        flipped = torch.rand(len(batch), 1, 1, 1) < 0.5
        batch = F.pad(torch.where(flipped, batch.flip(3), batch), (2, 2, 2, 2), mode="reflect")
        top, left = torch.randint(5, (2,)).tolist()
        yield batch[:, :, top : top + 32, left : left + 32].to(DEVICE), labels[rows].to(DEVICE)


@dataclass(frozen=True)
class Networks:
    """Networks by name: read from `weights`, trained on `images` the first time."""

    images: Path
    """CIFAR-10 as files: train/<class>/*.jpg and test/<class>/*.jpg."""
    weights: Path
    """A folder for NAME.safetensors."""
    published: bool = False
    """The natural network is pyautoattack's ResNet-18, in one part."""

    def __call__(self, name: str) -> nn.Module:
        """The network in eval mode, frozen. A new one for each call."""
        if self.published and name == "natural":
            return nn.Sequential(vanilla()).to(DEVICE).requires_grad_(False)
        path, recipe = self.weights / f"{name}.safetensors", RECIPES[name]
        torch.manual_seed(recipe.seed)
        model = recipe.build().to(DEVICE).to(memory_format=torch.channels_last)
        if path.is_file():
            model.load_state_dict(load_file(path, device=str(DEVICE)))
        else:
            self._train(name, model, recipe)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                state = model.state_dict().items()
                save_file({name: each.contiguous() for name, each in state}, temporary)
        return model.eval().requires_grad_(False)

    def calibration_images(self) -> Tensor:
        """Training images (500, 3, 32, 32), float32, 0 to 1."""
        return _training_images(self.images, 500)[0].to(DEVICE) / 255

    def _train(self, name: str, model: nn.Module, recipe: Recipe) -> None:
        start = time.perf_counter()
        if recipe.start:
            _take_weights(model, self(recipe.start))
        images, labels = _training_images(self.images, recipe.images)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        steps = recipe.epochs * (len(images) // 128)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps)
        model.train()
        loss = torch.zeros(())
        for _ in range(recipe.epochs):
            for batch in augmented_batches(images, labels):
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    loss = recipe.loss(model, *batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        seconds = time.perf_counter() - start
        print(f"trained {name}: {seconds:.0f} s, last loss {loss:.2f}", file=sys.stderr)


def _take_weights(model: nn.Module, other: nn.Module) -> None:
    own = model.state_dict()
    found = {
        name: each
        for name, each in other.state_dict().items()
        if name in own and own[name].shape == each.shape
    }
    model.load_state_dict(found, strict=False)


@cache
def _training_images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    return read_images(folder, "train", count)
