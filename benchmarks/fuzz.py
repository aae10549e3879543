"""Gives the package bad files: each must be refused in a short message that names it.

    python benchmarks/fuzz.py --seed 0

A case is a folder of good files with one value or some bytes changed, given to the function that
reads it. Counted are tracebacks, hangs over ten seconds, bad input that is accepted, and messages
that do not name the file, have over 1,000 characters or control characters. Where bytes change at
random, or a strange value may do, the file may also be accepted. Exit status 1 if there is a fault.
"""

import json
import os
import random
import shutil
import signal
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from tqdm import tqdm

from robust_submission import evaluate
from robust_submission.checker.unpack import RefusedError, unpack
from robust_submission.cli.command import Names, parse, run
from robust_submission.cli.errors import UserError, printable
from robust_submission.data.images import read_image
from robust_submission.data.sources import open_source, read_recipe
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint, load_trn, save_trn
from robust_submission.models.trn import TRN
from robust_submission.prediction.layout import expect
from robust_submission.prediction.validation import validate_file
from robust_submission.report.schema import read_report
from robust_submission.training.recipe import Recipe, as_plain
from robust_submission.training.recipe.trn import TRNRecipe
from robust_submission.training.saved_state import check_state, complete_state

SECONDS, LONGEST = 10, 1000
NAN, INF = float("nan"), float("inf")
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 0.5, 10**30, NAN, INF, "", "x", "\x1b[2J", "x" * 10**6, "\ud800"),
    *([], [[]], {}, {"a": 1}, ["x"] * 10**5, [0, 0]),
)
"""Values of which some are wrong for any key."""
NUMBERS = (None, True, "x", [], {"a": 1}, NAN)
WRONG: dict[str, tuple[Any, ...]] = {
    "class_names": (None, 5, "x", [], [["a"]], [None], ["\ud800"], {"a": 1}),
    "image_size": (*NUMBERS, 0, -1, 32.5, "32", 10**9),
    "mean": (*NUMBERS, [0, 0], [0, 0, "x"], [0, 0, NAN], [0, 0, 0, 0]),
    "std": (*NUMBERS, [1, 1, 0], [1, 1, INF], [1, 1]),
    "conceal": (None, 1, "x", []),
    "randomize": (True, 5, [], {"min_size": 0}, {"min_size": 99}, {"min_size": 1.5}, {"a": 1}),
    "restore": (5, [], {"depth": 10**5}, {"width": 0}, {"streams": "x"}, {"surrogate": {}}),
    "backbone": (None, 5, "", "x", "../x", "hf-hub:a/b", "local-dir:/", ["x"]),
    "backbone_args": (
        *(5, "x", [], {"checkpoint_path": "x.pth"}, {"pretrained": True}, {"device": "meta"}),
        *({"depths": [10**9]}, {"depths": "x"}, {"no_such": 1}, {"dims": [0, 0, 0, 0]}),
    ),
    "no_such_key": (1,),
}
"""Of a classifier's config.json."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One change to the good files, and what reads the file."""

    name: str
    change: Callable[[Path], object]
    """Changes the file."""
    read: Callable[[Path], object]
    """Reads the file."""
    path: str
    """The file, below the good files' folder."""
    bad: bool = True
    """Whether it must be refused."""


def write_good(folder: Path) -> None:
    """Files without a fault, of each kind."""
    names = [str(label) for label in range(10)]
    model = RobustClassifier(class_names=names, backbone="test_convnext", image_size=32)
    model.save_pretrained(folder / "run")
    save_trn(TRN(width=4, depth=1), folder / "trn")
    for kind, recipe in (("run", Recipe()), ("trn", TRNRecipe(checkpoint=Path("x")))):
        (folder / kind / "recipe.yaml").write_text(yaml.safe_dump(as_plain(recipe)))
    (folder / "data" / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    for ending in ("jpg", "png", "bmp", "webp", "tif", "gif", "ppm"):
        Image.fromarray(pixels).save(folder / "data" / "images" / f"0.{ending}")
    (folder / "data" / "label.txt").write_text("0.jpg 3\n0.png 4\n")
    (folder / "data" / "list.csv").write_text("image,label\nimages/0.jpg,a\nimages/0.png,b\n")
    (folder / "sub.csv").write_text("image_id,label\n0.jpg,3\n0.png,4\n")
    (folder / "sub.json").write_text('[{"image_id": 0, "category_id": 1}]')
    state = folder / "state" / "partial"
    state.mkdir(parents=True)
    for name in ("model.safetensors", "losses.safetensors", "metrics.json"):
        (state / name).write_bytes(name.encode())
    complete_state(state, "epoch-0001")
    with zipfile.ZipFile(folder / "package.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.py", "class Model: pass\n" * 99)
    stranger = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    images, labels = torch.rand(8, 3, 4, 4), torch.arange(8)
    evaluate(stranger, images, labels, attacks=("fgsm",), curves=False, out=folder / "report")


def _recipe(kind: type, path: Path) -> object:
    return parse(kind, ["--config", str(path)], path)


def _beside(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Reads the folder that the file is in."""
    return lambda path: read(path.parent)


def _unpacked(path: Path) -> object:
    with tempfile.TemporaryDirectory() as folder:
        return unpack(path, Path(folder))


READERS: dict[str, Callable[[Path], object]] = {
    "run/config.json": _beside(load_checkpoint),
    "run/model.safetensors": _beside(load_checkpoint),
    "trn/config.json": _beside(load_trn),
    "run/recipe.yaml": partial(_recipe, Recipe),
    "trn/recipe.yaml": partial(_recipe, TRNRecipe),
    "data/images/0.jpg": read_image,
    "data/images/0.png": read_image,
    "data/images/0.tif": read_image,
    "data/images/0.gif": read_image,
    "data/images/0.webp": read_image,
    "data/label.txt": _beside(lambda folder: open_source("challenge", folder)),
    "data/list.csv": lambda path: open_source("csv", path),
    "sub.csv": lambda path: validate_file(path, expect("csv")),
    "sub.json": lambda path: validate_file(path, expect("json")),
    "report/report.json": _beside(read_report),
    "state/epoch-0001/manifest.json": _beside(check_state),
    "state/epoch-0001/losses.safetensors": _beside(check_state),
    "package.zip": _unpacked,
}


def put_value(keys: tuple[str, ...], value: object) -> Callable[[Path], object]:
    """Replaces a value of a JSON or YAML file."""

    def change(path: Path) -> None:
        is_json = path.suffix == ".json"
        content = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
        group = content
        for key in keys[:-1]:
            group = group[key]
        group[keys[-1]] = value
        dump = json.dumps if is_json else yaml.safe_dump
        path.write_text(dump(content), errors="surrogatepass")

    return change


def scramble(seed: int) -> Callable[[Path], object]:
    """Cuts, overwrites, doubles or inserts bytes."""

    def change(path: Path) -> None:
        rng, content = random.Random(seed), path.read_bytes()
        start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        middle = content[start:end][:64]
        cut = {"cut": b"", "doubled": 3 * middle, "other": rng.randbytes(len(middle))}
        inserted = rng.choice((b"\0", b"\xff", b"\n", b'"', b"[" * 10**4, b"9" * 10**4, b",", b"-"))
        put = rng.choice((*cut.values(), inserted, middle + inserted))
        path.write_bytes(content[:start] + put + content[start + len(middle) :])

    return change


def _is_link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": _is_link("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a folder": Path.mkdir,
    "nothing": lambda path: None,
    "empty": Path.touch,
    "deep": lambda path: path.write_text("[" * 50_000),
}


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def leaves(kind: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys of a recipe and their types."""
    for field in fields(kind):  # pyright: ignore[reportArgumentType]
        keys = (*prefix, field.name)
        yield keys, field.type
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from leaves(field.type, keys)


def wrong_for(kind: Any) -> Iterator[object]:
    """Values that are wrong for a key of this type."""
    inner = {kind, *get_args(kind)}
    yield [[1]]
    if NoneType not in inner:
        yield None
    if not inner & {str, Path, Names}:
        yield "\x1b[2Jx"
    if inner & {int, float, bool}:
        yield {"a": 1}
    if kind is int:
        yield 1.5


RANGES: tuple[tuple[str, object], ...] = (
    *(("epochs", 0), ("batch_size", 0), ("seed", -1), ("seed", 2**32), ("save_steps", 0)),
    *(("ema_decay", 1.0), ("gradient_accumulation", 0), ("data.limit", 0)),
    *(("data.num_workers", -1), ("data.num_workers", 10**9), ("data.validation_limit", 0)),
    *(("data.validation_fraction", NAN), ("data.validation_fraction", 1.0)),
    *(("model.image_size", 0), ("model.image_size", 10**9), ("model.mean", [0.0, 0.0, INF])),
    *(("model.std", [1.0, 1.0, 0.0]), ("model.std", [1.0, 1.0, NAN]), ("optimizer.lr", INF)),
    *(("optimizer.lr", -1.0), ("optimizer.lr", NAN), ("optimizer.layer_decay", 0.0)),
    *(("optimizer.clip_grad", 0.0), ("objective.epsilon", "1/0"), ("objective.epsilon", "1e309")),
    *(("objective.epsilon", INF), ("objective.step_size", 0.0), ("objective.steps", 0)),
    *(("objective.beta", NAN), ("objective.label_smoothing", 1.0), ("mixup.prob", 2.0)),
)
"""Values of a recipe's keys that have the right type."""


def cases(seed: int, scrambles: int) -> Iterator[Case]:
    """All cases; the same for the same seed."""
    for path, read in READERS.items():
        for name, make in SPECIAL.items():
            yield Case(name=name, change=_replaced(make), read=read, path=path)
        for number in range(scrambles):
            change = scramble(1000 * seed + number)
            yield Case(name=f"bytes {number}", change=change, read=read, path=path, bad=False)
    yield from _configurations()
    yield from _recipes()


def _configurations() -> Iterator[Case]:
    for key, values in WRONG.items():
        yield from _values("run/config.json", (key,), values, bad=True)
        yield from _values("run/config.json", (key,), STRANGE, bad=False)
    for key in TRN(width=4, depth=1).arguments:
        yield from _values("trn/config.json", (key,), STRANGE, bad=False)
    for key in ("model", "data", "seed", "clean", "adaptive", "measurements", "checks", "verdict"):
        yield from _values("report/report.json", (key,), STRANGE, bad=False)
    for key in ("value", "low", "total"):
        wrong = (None, -1, INF, "x", [], {})
        yield from _values("report/report.json", ("clean", key), wrong, bad=True)


def _recipes() -> Iterator[Case]:
    for kind, path in ((Recipe, "run/recipe.yaml"), (TRNRecipe, "trn/recipe.yaml")):
        for keys, type_ in leaves(kind):
            yield from _values(path, keys, tuple(wrong_for(type_)), bad=True)
    for name, value in RANGES:
        yield from _values("run/recipe.yaml", tuple(name.split(".")), (value,), bad=True)
    for key in ("name", "root", "limit", "validation_fraction"):
        for case in _values("run/recipe.yaml", ("data", key), (5.5, [1], {"a": 1}), bad=True):
            yield replace(case, read=_beside(lambda run: read_recipe(run, "--images")))


def _values(path: str, keys: tuple[str, ...], values: tuple[Any, ...], bad: bool) -> Iterator[Case]:
    for value in values:
        name = f"{'.'.join(keys)} = {value!r:.30}"
        yield Case(name=name, change=put_value(keys, value), read=READERS[path], path=path, bad=bad)


class HangError(BaseException):
    """A case took too long; no `except Exception` stops it."""


def _hang(*_: object) -> NoReturn:
    raise HangError


def fault_of(case: Case, good: Path) -> str:
    """What is wrong with how a case ends; empty if nothing is."""
    with tempfile.TemporaryDirectory() as name:
        path = shutil.copytree(good, Path(name) / "files") / case.path
        case.change(path)
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(SECONDS)
        try:
            case.read(path)
        except (UserError, RefusedError) as error:
            return _fault_of_message(str(error), name if isinstance(error, UserError) else "")
        except HangError:
            return "hang"
        except Exception as error:
            return f"traceback: {type(error).__name__}: {printable(error):.300}"
        finally:
            signal.alarm(0)
    return "accepted" if case.bad else ""


def _fault_of_message(text: str, place: str) -> str:
    if place not in text:
        return f"unnamed: {text}"
    if max(map(len, text.split("\n"))) > LONGEST:
        return f"long: {len(text)} characters: {text:.200}"
    return "" if text == printable(text) else f"control characters: {text!a}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The cases."""

    seed: int = 0
    """Of the bytes that change."""
    scrambles: int = 30
    """How often they change in each file."""


def fuzz(options: Options) -> None:
    """Run all cases and count the faults.

    Raises:
        UserError: there is one.
    """
    faults = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        write_good(good := Path(name) / "good")
        everything = list(cases(options.seed, options.scrambles))
        for case in tqdm(everything, unit="case"):
            if fault := fault_of(case, good):
                faults[fault.partition(":")[0]] += 1
                tqdm.write(f"{case.path}, {case.name}: {fault}")
    counts = ", ".join(f"{faults[kind]} {kind}" for kind in faults) or "no fault"
    print(f"{len(everything)} cases: {counts}")
    if faults:
        raise UserError(f"fuzz: expected no fault, found {faults.total()}.")


if __name__ == "__main__":
    run(fuzz, Options)
