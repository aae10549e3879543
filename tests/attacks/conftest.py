from typing import NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Subject(NamedTuple):
    """A trained model and images that it was not trained on."""

    model: nn.Module
    images: Tensor  # (B, 3, 8, 8)
    labels: Tensor

    def first(self, count: int) -> "Subject":
        return Subject(self.model, self.images[:count], self.labels[:count])

    def losses(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(self.model(images), self.labels, reduction="none")

    def fooled(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(images).argmax(1) != self.labels

    def accuracy(self, images: Tensor) -> float:
        return 1 - self.fooled(images).float().mean().item()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def many_digits() -> Subject:
    """A small convolutional model that reads scikit-learn's digits; 500 images."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)
    labels = torch.tensor(bunch.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 16, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(8):
            for rows in torch.randperm(1200).split(100):
                loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Subject(model.eval(), images[1250:1750], labels[1250:1750])


@pytest.fixture(scope="session")
def digits(many_digits) -> Subject:
    """The same model and 100 of its images, of which it reads about 90."""
    return Subject(many_digits.model, many_digits.images[350:450], many_digits.labels[350:450])
