"""Write the prediction file of a folder of images, offline: python predict.py INPUT OUTPUT

Without arguments, of the images in /tmp/data, into the working folder. Needs torch, numpy and
Pillow; for Python 3.9 and newer. Beside this file: model.zip, the classifier with its weights, and
settings.json, what a row holds. An image that cannot be read is taken for a grey one, since each
image needs a row.
"""

import csv
import json
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile

HERE = Path(__file__).resolve().parent
BATCH = 32
GREY = 128
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".avif", ".tga", ".jp2"),
)
ORIENTATION = 0x0112
TURNS = {  # by EXIF's orientation; Image.Transpose came with Pillow 9.1
    2: 0,  # FLIP_LEFT_RIGHT
    3: 3,  # ROTATE_180
    4: 1,  # FLIP_TOP_BOTTOM
    5: 5,  # TRANSPOSE
    6: 4,  # ROTATE_270
    7: 6,  # TRANSVERSE
    8: 2,  # ROTATE_90
}
ImageFile.LOAD_TRUNCATED_IMAGES = True


def natural_key(name: str) -> list:
    """Sorts 2.png before 10.png, in every folder of a path."""
    parts = [re.split("([0-9]+)", folder) for folder in name.split("/")]
    return [[int(p) if place % 2 else p for place, p in enumerate(part)] for part in parts]


def find_images(source: str) -> tuple:
    """The folder that all images are in, and their names from there; says what it leaves out."""
    paths, others = [], []
    for folder, below, files in os.walk(source, followlinks=True):
        below[:] = [name for name in below if name[0] not in ".@" and name != "__MACOSX"]
        for path in (Path(folder, name) for name in files if name[0] != "."):
            (paths if path.suffix.lower() in ENDINGS else others).append(path)
    if others:
        names = ", ".join(map(str, others))
        print(f"left out, no images by their endings: {names}", file=sys.stderr)
    if not paths:
        sys.exit(f"{source}: expected images, found none.")
    top = Path(os.path.commonpath([path.parent for path in paths]))
    names = sorted(path.relative_to(top).as_posix() for path in paths)
    return top, sorted(names, key=natural_key)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: more than 8 bits scaled, transparent pixels over white."""
    if image.mode[0] in "IF" and image.mode != "1":
        values = np.asarray(image).astype(np.float64)
        whole = 65535 if values.max() <= 65535 else 2**31 - 1
        if image.mode == "F":
            whole = 1 if values.max() <= 1 else 255
        return Image.fromarray(np.rint(values * (255 / whole)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it is, where that cannot be read."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever reading EXIF raises
        turn = None
    return image if turn is None else image.transpose(turn)  # pyright: ignore[reportArgumentType]


def read_image(path: Path, size: int) -> np.ndarray:
    """The image as uint8 (size, size, 3): the shorter side scaled, the centre cut out."""
    try:
        with Image.open(path) as opened:
            opened.load()
            image = to_rgb(upright(opened))
    except Exception as error:  # whatever a decoder raises
        print(f"{path}: not read, taken for grey: {error}", file=sys.stderr)
        return np.full((size, size, 3), GREY, np.uint8)
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.BICUBIC, box=box)  # pyright: ignore[reportAttributeAccessIssue]
    return np.array(image)


def load_model(folder: str) -> torch.nn.Module:
    """Unpack model.zip, which has folders, and build its model."""
    with zipfile.ZipFile(HERE / "model.zip") as archive:
        archive.extractall(folder)
    sys.path.insert(0, folder)
    from model import Model  # pyright: ignore[reportMissingImports]

    return Model().float()


def predict(model: torch.nn.Module, top: Path, names: list, size: int) -> tuple:
    """Labels int64 (N,) and probabilities float32 (N, C), in batches of one shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels, shares, model = [], [], model.to(device)
    for start in range(0, len(names), BATCH):
        some = names[start : start + BATCH]
        pixels = np.zeros((BATCH, size, size, 3), np.uint8)
        pixels[: len(some)] = [read_image(top / name, size) for name in some]
        images = torch.from_numpy(pixels[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255  # BGR
        with torch.no_grad():
            logits = model(images.to(device))[: len(some)].cpu()
        labels.append(logits.argmax(1))
        shares.append(logits.double().softmax(1).float())
    return torch.cat(labels).tolist(), torch.cat(shares).tolist()


def main() -> None:
    source, target = sys.argv[1:] or ("/tmp/data", ".")
    settings = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
    top, names = find_images(source)
    with tempfile.TemporaryDirectory() as folder:
        labels, shares = predict(load_model(folder), top, names, settings["image_size"])
    path, written = Path(target, "submission.csv"), settings["label_names"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if settings["header"]:
            writer.writerow(settings["header"])
        for name, label, row in zip(names, labels, shares):  # noqa: B905 (Python 3.9)
            cells = [
                (written[label] if written else label)
                if column < 0
                else "{:.{}f}".format(row[column], settings["digits"])
                for column in settings["columns"]
            ]
            written_id = name if settings["endings"] else os.path.splitext(name)[0]  # noqa: PTH122
            writer.writerow([written_id, *cells])
    print(f"{path}: {len(names)} rows")


if __name__ == "__main__":
    main()
