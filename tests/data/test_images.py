"""Every mode of image file against pixel values known in advance, and every fault by its name."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robust_submission.cli.errors import UserError
from robust_submission.data import images
from robust_submission.data.images import decode_image, is_image, read_image, resize_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # pyright: ignore[reportArgumentType]
    return path


def picture(size: int = 64) -> Image.Image:
    """Noise: incompressible, so that cutting the file cuts pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png16(path: Path, values: np.ndarray) -> Path:
    """A 16-bit grey PNG, written here byte by byte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("ending", ["png", "bmp", "webp", "tiff", "ppm"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, ending: str) -> None:
    options = {"lossless": True} if ending == "webp" else {}
    image = read_image(save(picture(), tmp_path / f"a.{ending}", **options))
    assert image.dtype == np.uint8
    assert np.array_equal(image, np.asarray(picture()))
    (tmp_path / f"a.{ending}").rename(tmp_path / "a.gif")  # the ending need not tell the format
    assert np.array_equal(read_image(tmp_path / "a.gif"), image)


@pytest.mark.parametrize(
    ("name", "mode", "colour", "expected"),
    [
        ("a.jpg", "RGB", RED, RED),
        ("a.jpg", "CMYK", (0, 255, 255, 0), RED),
        ("a.tiff", "LAB", (255, 128, 128), WHITE),
    ],
)
def test_other_colour_spaces_come_in_rgb(
    tmp_path: Path, name: str, mode: str, colour: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    image = read_image(save(Image.new(mode, (8, 8), colour), tmp_path / name, quality=100))
    assert np.abs(image.astype(int) - expected).max() <= 3


def pillows(content: bytes) -> np.ndarray | None:
    """What Pillow alone makes of a file; None where it finds damage."""
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, SyntaxError):
        return None


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_jpeg_file_has_pillows_pixels(
    mode: str,
    subsampling: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = picture().crop((0, 0, 41, 23)).convert(mode)
    image.save(file := io.BytesIO(), "JPEG", quality=90, subsampling=subsampling, **options)
    content, expected = file.getvalue(), pillows(file.getvalue())
    rng = np.random.default_rng(0)
    for place in rng.integers(2, len(content), 40):
        damaged = content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        found = pillows(damaged)
        if found is None:
            with pytest.raises(UserError):
                decode_image(damaged, "a.jpg")
        else:
            assert np.array_equal(decode_image(damaged, "a.jpg"), found)
    monkeypatch.setattr(images, "_decode", None)  # a whole file is read without Pillow
    assert np.array_equal(decode_image(content, "a.jpg"), expected)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 200, (200, 200, 200)),
        ("LA", (200, 255), (200, 200, 200)),
        ("LA", (200, 0), WHITE),
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (*RED, 0), WHITE),
        ("RGBA", (*RED, 128), (255, 127, 127)),
    ],
)
def test_grey_and_transparent_modes_over_white(
    tmp_path: Path, mode: str, colour: int, expected: tuple[int, int, int]
) -> None:
    image = read_image(save(Image.new(mode, (3, 2), colour), tmp_path / "a.png"))
    assert image.shape == (2, 3, 3)
    assert (image == expected).all()


@pytest.mark.parametrize(
    ("ending", "transparency", "second"),
    [("png", 0, GREEN), ("gif", 0, GREEN), ("png", bytes([0, 128]), (127, 255, 127))],
)
def test_a_palette_with_transparent_colours(
    tmp_path: Path, ending: str, transparency: int | bytes, second: tuple[int, ...]
) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    path = save(image, tmp_path / f"a.{ending}", transparency=transparency)
    assert read_image(path).tolist() == [[list(WHITE), list(second)]]


def test_one_colour_of_rgb_may_be_transparent(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (1, 1), BLUE), tmp_path / "a.png", transparency=BLUE)
    assert read_image(path).tolist() == [[list(WHITE)]]


def test_sixteen_bit_grey_png_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]])
    image = read_image(png16(tmp_path / "a.png", values))
    assert image[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert (image == image[:, :, :1]).all()


def tiff(path: Path, values: list[float], kind: type[np.generic]) -> Path:
    return save(Image.fromarray(np.array([values], dtype=kind)), path)


def test_integer_grey_is_scaled(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 257, 65535))
    assert read_image(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 1, 255]
    full = tiff(tmp_path / "full.tiff", [0, 2**30, 2**31 - 1], np.int32)
    assert read_image(full)[0, :, 0].tolist() == [0, 128, 255]
    sixteen = tiff(tmp_path / "sixteen.tiff", [0, 257, 65535], np.int32)
    assert read_image(sixteen)[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("scale", [1, 255])
def test_float_grey_of_either_range(tmp_path: Path, scale: int) -> None:
    path = tiff(tmp_path / "a.tiff", [each * scale for each in (0, 0.2, 0.6, 1)], np.float32)
    assert read_image(path)[0, :, 0].tolist() == [0, 51, 153, 255]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        *((np.float32, value, r".* in 0\.\.1 or 0\.\.255") for value in (-1, 256, np.nan, np.inf)),
        (np.int32, -5, ".*found -5"),
    ],
)
def test_grey_out_of_range_is_refused(
    tmp_path: Path, kind: type[np.generic], value: float, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"a\.tiff: expected {message}"):
        read_image(tiff(tmp_path / "a.tiff", [0, value], kind))


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [*enumerate(["ab/cd", "ba/dc", "dc/ba", "cd/ab", "ac/bd", "ca/db", "db/ca", "bd/ac"], start=1)],
)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, expected: str, ending: str) -> None:
    levels = {"a": 0, "b": 80, "c": 160, "d": 240}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(
        np.array([[0, 80], [160, 240]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    )
    path = save(image.convert("RGB"), tmp_path / f"a.{ending}", exif=exif, quality=95)
    corners = read_image(path)[4::8, 4::8, 0].astype(int)
    wanted = [[levels[corner] for corner in row] for row in expected.split("/")]
    assert np.abs(corners - wanted).max() <= 8


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_of_an_animation(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"a.{ending}"
    save(frames[0], path, save_all=True, append_images=frames[1:], **options)
    assert (read_image(path) == RED).all()


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp", "gif", "tiff", "ppm"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_named(tmp_path: Path, ending: str, share: float) -> None:
    path = save(picture(), tmp_path / f"a.{ending}")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"a\.\w+: expected .*, found") as caught:
        read_image(path)
    assert str(caught.value).count("\n") == 0


def test_other_faults_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    for name, found in {
        "empty.png": "0 bytes",
        "text.png": "12 bytes of something else",
        "folder.png": "a folder",
        "missing.png": "nothing there",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: expected an image.*found {found}"):
            read_image(tmp_path / name)


def with_chunk(path: Path, kind: bytes, body: bytes, before: bytes = b"IDAT", crc: int = 0) -> Path:
    """A PNG with one chunk more, whose checksum is off by `crc`."""
    content = save(picture(), path).read_bytes()
    checksum = struct.pack(">I", zlib.crc32(kind + body) ^ crc)
    place = content.index(before) - 4
    chunk = struct.pack(">I", len(body)) + kind + body + checksum
    path.write_bytes(content[:place] + chunk + content[place:])
    return path


MUCH = bytes(np.random.default_rng(0).integers(32, 127, 3 << 20, dtype=np.uint8))
EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"  # turned by 180 degrees


@pytest.mark.parametrize(
    ("kind", "body", "crc"),
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(MUCH), 0),
        (b"iTXt", b"Comment\0\x01\0\0\0" + zlib.compress(MUCH), 0),
        (b"iCCP", b"profile\0\0" + zlib.compress(MUCH), 0),
        (b"iCCP", b"profile\0\0not deflated", 0),
        (b"tEXt", b"Comment\0of another checksum", 1),
        (b"eXIf", b"no TIFF header", 0),
        (b"eXIf", EXIF[:12], 0),
        (b"eXIf", b"no TIFF header", 1),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning:PIL")
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_what_a_png_says_beside_its_pixels_may_be_long_or_damaged(
    tmp_path: Path, kind: bytes, body: bytes, crc: int, before: bytes
) -> None:
    path = with_chunk(tmp_path / "a.png", kind, body, before, crc)
    assert np.array_equal(read_image(path), np.asarray(picture()))


def test_a_damaged_text_does_not_hide_the_orientation(tmp_path: Path) -> None:
    path = with_chunk(tmp_path / "a.png", b"eXIf", EXIF)
    turned = np.asarray(picture())[::-1, ::-1]
    assert np.array_equal(read_image(path), turned)
    content, long = path.read_bytes(), with_chunk(tmp_path / "b.png", b"tEXt", b"a\0b", crc=1)
    start = content.index(b"eXIf") - 4
    text = long.read_bytes()
    place = text.index(b"IDAT") - 4
    long.write_bytes(text[:place] + content[start : start + 12 + len(EXIF)] + text[place:])
    assert np.array_equal(read_image(long), turned)


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        *(("AVIF", ".avif"), ("TGA", ".tga"), ("JPEG2000", ".jp2"), ("QOI", ".qoi")),
        *(("MPO", ".mpo"), ("PCX", ".pcx"), ("ICO", ".ico"), ("SGI", ".rgb"), ("DDS", ".dds")),
    ],
)
def test_further_formats(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / f"a{ending.upper()}"
    picture().save(path, kind)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert is_image(str(path)) and np.array_equal(read_image(path), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
def test_an_image_without_an_ending_is_known_by_its_content(tmp_path: Path, kind: str) -> None:
    picture().save(tmp_path / "a", kind)
    assert is_image(str(tmp_path / "a")) and read_image(tmp_path / "a").shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("LICENSE", b"Permission is hereby granted"), ("Makefile", b"P=1\n"), ("none", b"")),
        *(("a.txt", b"\xff\xd8\xff\xe0"), ("a.eps", b"%!PS-Adobe-3.0 EPSF"), ("a.pdf", b"%PDF-")),
    ],
)
def test_other_files_are_no_images(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert not is_image(str(tmp_path / name))


def test_a_damaged_image_is_not_taken_for_another_format(tmp_path: Path) -> None:
    """A TGA has no signature: zeros could be one."""
    (tmp_path / "a.png").write_bytes(bytes(2) + b"\x02" + bytes(9) + b"\1\0\1\0\x18\0" + b"abc")
    with pytest.raises(ValueError, match=r"a\.png: expected an image \(JPEG, .* something else"):
        read_image(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.tga")
    assert read_image(tmp_path / "a.tga").tolist() == [[list(b"cba")]]


@pytest.mark.parametrize("excess", [1.5, 4])
def test_decompression_bombs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: float
) -> None:
    """Above the limit Pillow only warns, above twice the limit it raises."""
    path = save(Image.new("L", (100, 100)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 / excess))
    with pytest.raises(
        ValueError, match=r"a\.png: expected an image of at most .* found 100 x 100"
    ):
        read_image(path)
    assert decode_image(path.read_bytes(), "a.png", 10_000).shape == (100, 100, 3)
    with pytest.raises(ValueError, match="an image of at most 9,999 pixels"):
        decode_image(path.read_bytes(), "a.png", 9_999)


# Pillow warns of damaged TIFF tags that it can read past.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_give_an_image_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    usual = ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"]
    kind = data.draw(st.sampled_from([*usual, "AVIF", "JPEG2000", "QOI", "PCX", "ICO", "DDS"]))
    picture(12).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(content))
    try:
        image = read_image(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: expected")
    else:
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3


def test_resizing_scales_the_shorter_side_and_cuts_the_centre() -> None:
    image = np.asarray(picture(30))[:10]
    whole = Image.fromarray(image).resize((15, 5), Image.Resampling.BICUBIC)
    resized = resize_image(image, 5)
    assert np.array_equal(resized, np.asarray(whole)[:, 5:10])
    turned = resize_image(image.transpose(1, 0, 2), 5).transpose(1, 0, 2)
    np.testing.assert_allclose(turned, resized.astype(int), atol=1)  # as Pillow's version rounds


def test_cutting_alone_keeps_pixels() -> None:
    image = np.asarray(picture(9))[:8]  # 8 x 9
    square = resize_image(image, 8)
    assert np.array_equal(square, image[:, :8])
    assert resize_image(square, 8) is square


def test_shrinking_is_antialiased() -> None:
    columns = np.tile(np.array([0, 255], dtype=np.uint8), 32)
    stripes = np.broadcast_to(columns[None, :, None], (64, 64, 3)).copy()
    inside = resize_image(stripes, 8)[:, 1:-1].astype(int)
    assert np.abs(inside - 127.5).max() < 10
