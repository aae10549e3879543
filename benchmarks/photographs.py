"""CIFAR-10 photographs as JPEG files of any size, for benchmarks of whole commands."""

from pathlib import Path

from PIL import Image

CLASSES = 10


def make_folder(images: Path, folder: Path, count: int, side: int) -> Path:
    """Write `count` training and ten validation JPEG files, photographs resized to a square.

    Args:
        images: train/<class>/*.jpg and test/<class>/*.jpg.
        folder: New; gets train/<class> and val/<class>, the classes in turn.
        count: Beyond the photographs that there are, the first ones come again.
        side: Of the files' images, in pixels.
    """
    for source, split, number in (("train", "train", count), ("test", "val", min(count, CLASSES))):
        classes = sorted(path for path in (images / source).iterdir() if path.is_dir())
        photographs = [sorted(path.glob("*.jpg")) for path in classes]
        for index in range(number):
            place, label = divmod(index, len(classes))
            target = folder / split / classes[label].name
            target.mkdir(parents=True, exist_ok=True)
            photograph = photographs[label][place % len(photographs[label])]
            with Image.open(photograph) as image:
                resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            resized.save(target / f"{place}.jpg", quality=90)
    return folder
