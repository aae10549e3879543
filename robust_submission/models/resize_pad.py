"""Random resize-and-pad at inference (Xie et al. 2018, arXiv 1711.01991), seeded per image.

Each image is shrunk (nearest neighbour) to a random side and zero-padded back at a random place.
The draw is a function of (seed, draw, the image's own 8-bit pixels): the same image gets the same
draw in any batch, process or run, and an image changed by an attack gets a fresh one. Averaging
over `draw` = 0, 1, 2, … is the expectation over transformations of Athalye et al. 2018, against
which this defence adds no robustness.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MASK32 = 0xFFFFFFFF


def _mix(state: Tensor) -> Tensor:
    """A 32-bit integer hash (Mueller's), elementwise on int64; the same on every device."""
    for _ in range(2):
        state = ((state >> 16) ^ state) * 0x45D9F3B & _MASK32
    return (state >> 16) ^ state


def image_keys(images: Tensor, seed: int) -> Tensor:
    """A 32-bit key for each image from its pixels rounded to 8 bits.

    Args:
        images: Shape (B, C, H, W), 0 to 1.
        seed: Any integer.

    Returns:
        int64 keys of shape (B,), from 0 to 2**32 - 1.
    """
    levels = (images.detach().float() * 255).round().to(torch.int64).flatten(1)  # (B, C*H*W)
    places = torch.arange(levels.shape[1], device=levels.device)
    content = _mix(levels + (places << 9)).sum(1)  # (B,)
    return _mix((content + (seed & _MASK32)) & _MASK32)


class RandomResizePad(nn.Module):
    """Shrink each image to a random side and pad it back with zeros at a random place.

    A nearest-neighbour resize followed by a pad is one gather per axis, so the layer is
    differentiable, runs on whole batches and exports.

    Args:
        image_size: Side of the (square) input and output, in pixels.
        min_size: Smallest side drawn; the largest is `image_size - 1` (218 to 223 at 224 in the
            challenge's second place).
        seed: Base of every draw.

    Attributes:
        draw: Number of the independent draw that is used; 0 unless set.

    Raises:
        ValueError: `min_size` is not between 1 and `image_size - 1`.
    """

    keys: Tensor | None = None
    """(B,), int64, from 0: drawn with, whatever the images; None for the images' own keys."""

    def __init__(self, image_size: int, min_size: int, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= min_size < image_size:
            raise ValueError(
                f"RandomResizePad: expected 1 <= min_size < image_size = {image_size}, "
                f"received min_size = {min_size}."
            )
        self.image_size = image_size
        self.min_size = min_size
        self.seed = seed
        self.draw = 0

    def sample(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Side, top and left of each image: int64, shape (B,) each."""
        key = self.keys
        if key is None:
            key = image_keys(images, self.seed * 0x9E3779B1 + self.draw)
        side = self.min_size + key % (self.image_size - self.min_size)
        free = self.image_size - side + 1
        return side, _mix(key ^ 0x5BD1E995) % free, _mix(key ^ 0x27D4EB2F) % free

    def forward(self, images: Tensor) -> Tensor:
        side, top, left = self.sample(images)
        rows, row_inside = self._source(side, top)  # (B, H)
        columns, column_inside = self._source(side, left)  # (B, W)
        batch, channels, height, width = images.shape
        images = images.gather(2, rows[:, None, :, None].expand(batch, channels, height, width))
        images = images.gather(3, columns[:, None, None, :].expand(batch, channels, height, width))
        inside = row_inside[:, None, :, None] & column_inside[:, None, None, :]
        return images * inside

    def _source(self, side: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """For each output line, the input line that it copies, and whether that is in the image."""
        line = torch.arange(self.image_size, device=side.device) - start[:, None]
        inside = (line >= 0) & (line < side[:, None])
        source = line * self.image_size // side[:, None]
        return source.clamp(0, self.image_size - 1), inside

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}, min_size={self.min_size}, seed={self.seed}"
