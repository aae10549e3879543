"""Image files to RGB arrays: whatever Pillow reads, and one message for every fault."""

import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header

from robust_submission.cli.documents import read_file
from robust_submission.cli.errors import UserError

Image.init()
_USUAL = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # are tried first
_NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")  # by Pillow itself
FORMATS = (*_USUAL, *sorted(Image.OPEN.keys() - {*_USUAL, *_NOT_DECODED}))
_FORMAT_OF = {
    ending: kind
    for ending, kind in Image.registered_extensions().items()
    if kind in (*FORMATS, "MPO")  # which is opened as JPEG
}

# What Pillow's decoders raise on damaged bytes, besides OSError.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    AttributeError,  # EXIF of another type than its tag's
    struct.error,
)
_DECODER_ERRORS = (*_DAMAGED, MemoryError)

_JPEG = b"\xff\xd8\xff"
_APP1 = b"\xff\xe1"  # begins EXIF and XMP, which may hold an orientation
_PNG = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND")


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file; UserError where they cannot be read."""
    return read_file(path, "an image file")


def _sixteen_to_eight_bits(values: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, rounded: 65535 / 255 = 257."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _integers_to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Mode I, which holds 16-bit values (16-bit PGM) or 31-bit ones.

    A picture of 31 bits with nothing above 65535 would be black throughout, so that the largest
    value tells the two apart.
    """
    if values.min() < 0:
        raise UserError(f"grey levels from 0, found {values.min()}")
    if values.max() <= 65535:
        return _sixteen_to_eight_bits(values)
    return np.rint(values * (255 / (2**31 - 1))).astype(np.uint8)


def _floats_to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Mode F: 0 to 1 where no value is above 1, else 0 to 255."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # also for NaN
        raise UserError(f"float levels in 0..1 or 0..255, found {low:g}..{high:g}")
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


def _has_signature(kind: str, content: bytes) -> bool:
    """Whether the first bytes are those of a format; never where it does not fix them, as TGA."""
    accept = Image.OPEN[kind][1]
    with suppress(IndexError, struct.error):  # of fewer bytes than a signature
        return accept is not None and accept(content[:16]) is True
    return False


def is_image(path: str) -> bool:
    """Whether a file is an image by its ending or, without one, by its first bytes."""
    if ending := os.path.splitext(path)[1].lower():  # noqa: PTH122
        return ending in _FORMAT_OF
    content = b""
    with suppress(OSError):
        if os.path.isfile(path):  # noqa: PTH113
            with open(path, "rb") as file:  # noqa: PTH123
                content = file.read(16)
    return any(_has_signature(kind, content) for kind in FORMATS)


def _open(content: bytes, ending: str) -> ImageFile.ImageFile:
    """As `Image.open`, but of any size, and a format without a signature (TGA) by the ending."""
    for kind in FORMATS:
        factory, accept = Image.OPEN[kind]
        if _has_signature(kind, content) if accept else _FORMAT_OF.get(ending) == kind:
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # as in Pillow
                return factory(io.BytesIO(content), "")
    raise UnidentifiedImageError


def _decode(
    content: bytes, ending: str, max_pixels: int | None, least_side: int | None
) -> np.ndarray:
    with _open(content, ending) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"{image.width} x {image.height}")
        if least_side is not None:
            image.draft(None, (least_side, least_side))
        image.load()
        with suppress(*_DAMAGED):  # of EXIF that cannot be read, the pixels can
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def _decode_plain_jpeg(
    content: bytes, max_pixels: int | None, least_side: int | None
) -> np.ndarray | None:
    """Pillow's pixels of a JPEG file in a part of its time; None for a file that needs Pillow.

    Both decode by libjpeg-turbo with the same settings. Pillow knows more colour spaces, the
    orientation and reduced scales, and it has the last word on damage.
    """
    if not content.startswith(_JPEG) or _APP1 in content:
        return None
    with suppress(ValueError, LookupError, MemoryError):  # warnings count, and odd subsampling
        *sides, colours, _ = decode_jpeg_header(content)
        height, width = (int(side) for side in sides)
        too_large = max_pixels is not None and height * width > max_pixels
        reduced = least_side is not None and min(height, width) >= 2 * least_side
        if colours in ("YCbCr", "Gray") and not too_large and not reduced:
            return decode_jpeg(content, "RGB")
    return None


def _without_notes(png: bytes) -> bytes:
    """A PNG without its texts and profiles, of which Pillow refuses long or damaged ones."""
    kept, start = [_PNG], len(_PNG)
    while start + 12 <= len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4])
        kind, chunk = png[start + 4 : start + 8], png[start:end]
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind in _PIXEL_CHUNKS or (kind == b"eXIf" and whole):
            kept.append(chunk)
        start = end
    return b"".join(kept)


def decode_image(
    content: bytes, name: str, max_pixels: int | None = None, least_side: int | None = None
) -> np.ndarray:
    """Decode the bytes of an image file as uint8 (H, W, 3), RGB; messages begin with `name`.

    Transparent pixels are laid over white. 16- and 32-bit grey is scaled to 8 bits; a float grey
    counts as 0 to 1 where no value exceeds 1, else as 0 to 255. CMYK and LAB are converted, the
    EXIF orientation is applied if it can be read, and of an animation the first frame is taken.

    Args:
        content: The file's bytes.
        name: The file's name; its ending tells the format where the bytes do not.
        max_pixels: The largest size that is decoded; None for Pillow's own limit
            (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million).
        least_side: For training, JPEG files are decoded at 1/2, 1/4 or 1/8 of their size as long as
            no side gets below this, which is faster; None for every pixel.

    Raises:
        UserError: empty, no image, truncated or damaged, or too large.
    """
    if not content:
        raise UserError(f"{name}: expected an image file, found 0 bytes.")
    most, ending = max_pixels or Image.MAX_IMAGE_PIXELS, PurePath(name).suffix.lower()
    plain = _decode_plain_jpeg(content, most, least_side)
    if plain is not None:
        return plain
    try:
        try:
            return _decode(content, ending, most, least_side)
        except _DECODER_ERRORS:
            if not content.startswith(_PNG):
                raise
            return _decode(_without_notes(content), ending, most, least_side)
    except UnidentifiedImageError:
        found = f"{len(content)} bytes of something else, or damaged at their start"
        kinds = f"{', '.join(_USUAL)} …"
        raise UserError(f"{name}: expected an image ({kinds}), found {found}.") from None
    except Image.DecompressionBombError as error:
        expected = f"an image of at most {most:,} pixels (see max_pixels)"
        raise UserError(f"{name}: expected {expected}, found {error}.") from None
    except UserError as error:
        raise UserError(f"{name}: expected {error}.") from error
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
