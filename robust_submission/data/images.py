"""Image files to RGB arrays: every mode that Pillow reads, and one message for every fault."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from robust_submission.cli.errors import UserError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp"),
    *(".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm"),
)

# What Pillow's decoders raise on damaged bytes, besides OSError.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
)


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file; UserError where they cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: expected an image file, found nothing there.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected an image file, found a folder.") from None
    except OSError as error:
        found = error.strerror or str(error)
        raise UserError(f"{path}: expected a readable image file, found: {found}.") from error


def _sixteen_to_eight_bits(values: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, rounded: 65535 / 255 = 257."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _integers_to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Mode I, which holds 16-bit values (16-bit PGM) or 31-bit ones.

    A picture of 31 bits with nothing above 65535 would be black throughout, so that the largest
    value tells the two apart.
    """
    if values.min() < 0:
        raise UserError(f"grey levels from 0 expected, {values.min()} found")
    if values.max() <= 65535:
        return _sixteen_to_eight_bits(values)
    return np.rint(values * (255 / (2**31 - 1))).astype(np.uint8)


def _floats_to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Mode F: 0 to 1 where no value is above 1, else 0 to 255."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # also for NaN
        raise UserError(f"float levels in 0..1 or 0..255 expected, {low:g}..{high:g} found")
    return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)


_TO_EIGHT_BITS = {
    "I;16": _sixteen_to_eight_bits,
    "I": _integers_to_eight_bits,
    "F": _floats_to_eight_bits,
}
"""Of Pillow's modes of grey of more than 8 bits; some are followed by the order of the bytes."""


def _to_rgb(image: Image.Image) -> np.ndarray:
    if to_eight_bits := _TO_EIGHT_BITS.get(image.mode[:4]):
        return np.repeat(to_eight_bits(np.asarray(image))[:, :, None], 3, axis=2)
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        assert converted is not None  # None only when it works in place
        return np.array(converted)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image.convert("RGBA"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 (H, W, 3), RGB; see `decode_image`.

    Raises:
        UserError: nothing there, unreadable, or no whole image.
    """
    return decode_image(read_bytes(Path(path)), str(path))


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Decode the bytes of an image file as uint8 (H, W, 3), RGB; messages begin with `name`.

    Transparent pixels are laid over white. 16- and 32-bit grey is scaled to 8 bits; a float grey
    counts as 0 to 1 where no value exceeds 1, else as 0 to 255. CMYK and LAB are converted, the
    EXIF orientation is applied, and of an animation the first frame is taken.

    Raises:
        UserError: empty, no image, truncated or damaged, or more pixels than Pillow holds safe
            to decode (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if not content:
        raise UserError(f"{name}: expected an image file, found 0 bytes.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        found = f"{len(content)} bytes of something else, or damaged at their start"
        raise UserError(f"{name}: expected an image ({kinds}), found {found}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = f"an image of at most {Image.MAX_IMAGE_PIXELS} pixels"
        raise UserError(f"{name}: expected {most}, found more.") from None
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        found = f"found it truncated or damaged ({reason})"
        raise UserError(f"{name}: expected a whole image, {found}.") from error


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side to `size` and cut the centre: uint8 (H, W, 3) to (size, size, 3).

    Bicubic, antialiased when it shrinks. An image of that size comes back as it is.
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.array(resized)
