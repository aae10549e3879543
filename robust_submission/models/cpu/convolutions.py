"""Convolutions of small images and of few patches on a CPU, computed as products.

oneDNN is slow on small images: it convolves image by image where one product has the pixels of all
images as its rows, and some gradients it computes by no kernel at all.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robust_submission.models.cpu.depthwise import (
    convolve_by_columns,
    gains_by_columns,
    sum_of_pairs,
)
from robust_submission.models.cpu.products import is_float32_on_cpu, needs_gradient, product

_ONEDNN_BLOCK = 16
"""Most channels in a block of oneDNN. A strided 1x1 kernel over fewer must not be oneDNN's: the
gradient of its weights is wrong, and the heap corrupted (oneDNN issue 6035)."""
_MOST_PATCHES = 16
"""An image of at most so many patches is multiplied by the weights."""
_MOST_PATCHES_WITH_GRADIENT = 256
"""The same where a gradient is needed: oneDNN's gradient of patches is slower still."""
_MOST_PAIRS = 256
"""Pairs of a pixel and a place of the kernel that are multiplied one by one: all of 4x4 and 4x4."""


class ProductConv2d(nn.Conv2d):
    """nn.Conv2d, within rounding, as a product where that is faster.

    - 1x1 kernels: each pixel is a row of one product.
    - Kernels side by side (the stems and downsampling of ConvNeXt and ViT): each patch is, in
      images of few patches.
    - A kernel that fits in one place only, around the whole image: each image is.
    - Depthwise kernels whose weights need a gradient: see `depthwise`.

    Everything else is torch's. Results may differ, within rounding, with whether a gradient is
    recorded.
    """

    @staticmethod
    def suits(layer: nn.Conv2d) -> bool:
        """Zero-padded, not dilated, and dense or with one kernel per channel."""
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return zeros and layer.dilation == (1, 1) and (layer.groups == 1 or depthwise)

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H', W')."""
        if input.ndim != 4 or input.device.type != "cpu":
            return super().forward(input)
        if self.multiplies_pixels(input):
            down, right = self.stride
            seen = input if down == right == 1 else input[:, :, ::down, ::right]  # a view: 10 us
            pixels, weight = seen.permute(0, 2, 3, 1), self.weight.flatten(1)
            return product(pixels, weight, self.bias).permute(0, 3, 1, 2)
        if self.multiplies_patches(input):
            patches, weight = self._patches(input), self.weight.permute(0, 2, 3, 1).flatten(1)
            return product(patches, weight, self.bias).permute(0, 3, 1, 2)
        if self.multiplies_pairs(input):
            return sum_of_pairs(input, self.weight, self.bias, self._zeros())
        if self.gains_by_columns(input):
            return convolve_by_columns(input, self.weight, self.bias)
        if (part := self.part_over(input)) is None:
            return super().forward(input)
        if self.groups == 1:
            rows, weight = (each.permute(0, 2, 3, 1).flatten(1) for each in (input, part))
            return product(rows, weight, self.bias)[:, :, None, None]
        products = (input * part[:, 0]).sum((2, 3), keepdim=True)
        return products if self.bias is None else products + self.bias[:, None, None]

    def _zeros(self) -> tuple[int, int]:
        """Zeros above and below, left and right."""
        down, right = self.padding
        assert isinstance(down, int) and isinstance(right, int)  # not "same": `suits`
        return down, right

    def _axes(self, images: Tensor) -> Iterator[tuple[int, int, int, int]]:
        """For rows, then columns: pixels in an image and in the kernel, padding, stride."""
        sizes = images.shape[2:]
        return zip(sizes, self.kernel_size, self._zeros(), self.stride, strict=True)

    def multiplies_pixels(self, images: Tensor) -> bool:
        """1x1 kernels on channels-last images."""
        one_by_one = {*self.kernel_size, self.groups} == {1} and set(self.padding) == {0}
        either = set(self.stride) == {1} or self.in_channels < _ONEDNN_BLOCK
        in_order = images.is_contiguous(memory_format=torch.channels_last)
        return one_by_one and either and in_order

    def multiplies_patches(self, images: Tensor) -> bool:
        """Few patches, side by side; channels-last, as the product is."""
        beside = self.kernel_size == self.stride != (1, 1) and set(self.padding) == {0}
        (rows, columns), (height, width) = self.kernel_size, images.shape[2:]
        if not beside or self.groups > 1 or height % rows or width % columns:
            return False
        gradient = needs_gradient(images) or needs_gradient(self.weight)
        most = _MOST_PATCHES_WITH_GRADIENT if gradient else _MOST_PATCHES
        few = (height // rows) * (width // columns) <= most
        return few and self.weight.is_contiguous(memory_format=torch.channels_last)

    def _patches(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H / rows, W / columns, rows * columns * C)."""
        batch, channels, height, width = images.shape
        rows, columns = self.kernel_size
        strips = (batch, height // rows, rows, width // columns, columns * channels)
        return torch.cat(images.permute(0, 2, 3, 1).reshape(strips).unbind(2), dim=-1)

    def part_over(self, images: Tensor) -> Tensor | None:
        """The part of the kernel that lies over the image, (out, in, H, W), if there is only one
        place for the kernel, and it reaches beyond the image on all sides."""
        part = self.weight
        for axis, (size, side, padding, step) in enumerate(self._axes(images), start=2):
            if not 0 <= size + 2 * padding - side < step or padding + size > side:
                return None
            part = part.narrow(axis, padding, size)
        return part

    def multiplies_pairs(self, images: Tensor) -> bool:
        """Depthwise with a gradient, a kernel larger than the image; few pixels and places."""
        if not self._is_trained_depthwise():
            return False
        axes = list(self._axes(images))
        places = [size + 2 * padding - side + 1 for size, side, padding, _ in axes]
        larger = any(side > size for size, side, _, _ in axes)
        pairs = math.prod(places) * math.prod(images.shape[2:])
        return larger and min(places) > 0 and pairs <= _MOST_PAIRS

    def gains_by_columns(self, images: Tensor) -> bool:
        """Depthwise with a gradient, a wide kernel within the image, padded to keep its size."""
        sides = zip(self._zeros(), self.kernel_size, strict=True)
        keeps_size = all(2 * zeros + 1 == side for zeros, side in sides)
        if not (keeps_size and self._is_trained_depthwise()):
            return False
        return gains_by_columns(images, self.weight) and is_float32_on_cpu(images)

    def _is_trained_depthwise(self) -> bool:
        return self.groups > 1 and self.stride == (1, 1) and needs_gradient(self.weight)

    def _get_name(self) -> str:
        return nn.Conv2d.__name__
