"""evaluate.py from end to end, on a tiny classifier of digits."""

import json
import multiprocessing
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from inference.evaluate import Options, load_twin
from inference.evaluate import main as evaluate
from robust_submission.cli.command import Names, Ratios, run
from robust_submission.cli.errors import UserError
from robust_submission.cli.numbers import SPACE
from robust_submission.data.images import resize_image
from robust_submission.data.sources import open_source
from robust_submission.evaluation.data import open_evaluation_data
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.load import load_checkpoint
from robust_submission.report.adversarial import AdversarialImages
from robust_submission.settings import DataOptions
from tests.conftest import run_command

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["inference.evaluate", "robust_submission.report.write"])
FILES = ("report.json", "per_image.csv", "report.html")
Run = Callable[..., dict[str, Any]]


def options(checkpoint: Path, out: Path, **changes: Any) -> Options:
    small = Options(
        checkpoint=checkpoint,
        out=out,
        attacks=Names("fgsm,pgd"),
        steps=3,
        limit=140,
        corruptions=Names("contrast,gaussian_noise"),
    )
    return replace(small, **changes)


def start(chosen: Options) -> ForkServerProcess:
    """evaluate() in a process of its own, which takes no second to start."""
    process = FORKSERVER.Process(target=evaluate, args=(chosen,))
    process.start()
    return process


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The forkserver inherits it: equal threads, equal bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def report_of(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Evaluate a checkpoint, its config changed, and read the report."""

    def run_it(checkpoint: Path, config: dict[str, Any] | None = None, **changes: Any) -> Any:
        folder = tmp_path_factory.mktemp("evaluated")
        shutil.copytree(checkpoint, folder / "run", ignore=shutil.ignore_patterns("state", "logs"))
        settings = json.loads((folder / "run" / "config.json").read_text()) | (config or {})
        (folder / "run" / "config.json").write_text(json.dumps(settings))
        process = start(options(folder / "run", folder / "report", **changes))
        process.join()
        assert process.exitcode == 0
        return json.loads((folder / "report" / "report.json").read_text())

    return run_it


@pytest.fixture(scope="module")
def finished(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report folder of a run that nothing interrupted, and its adversarial images."""
    folder = tmp_path_factory.mktemp("finished")
    out = folder / "deep" / "report"
    saved = {"save_adversarial": folder / "images.pt", "save_images": folder / "images"}
    process = start(options(small_run, out, **saved))
    process.join()
    assert process.exitcode == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """The files' bytes, the state of the source tree apart."""
    git = re.compile(rb"(unknown|[0-9a-f]{40})(\+changes)?")
    return {name: git.sub(b"", (folder / name).read_bytes()) for name in FILES}


def check(report: dict[str, Any], name: str) -> str:
    (found,) = [each["outcome"] for each in report["checks"] if each["name"] == name]
    return found


def value(report: dict[str, Any], name: str) -> float:
    (found,) = [each for each in report["measurements"] if each["name"] == name]
    return found["robust_accuracy"]["value"]


def test_behind_gcm_the_two_numbers_part_and_the_verdict_is_masked(finished: Path):
    report = json.loads((finished / "report.json").read_text())
    assert report["verdict"] == "masked"
    assert report["clean"]["value"] == report["twin_clean"]["value"] > 0.6
    assert report["oblivious"]["value"] > report["adaptive"]["value"] + 0.15
    assert report["oblivious"]["low"] > report["adaptive"]["high"]
    assert check(report, "oblivious and adaptive agree") == "masking"
    assert check(report, "size of gradients") == "masking"
    assert check(report, "epsilon 0") == check(report, "inside the ball") == "ok"
    assert check(report, "large epsilon, adaptive") == "ok"
    assert value(report, "pgd-3 linf 8/255 transfer") < value(report, "pgd-3 linf 8/255 oblivious")


def test_the_parts_of_the_report_fit_together(finished: Path):
    report = json.loads((finished / "report.json").read_text())
    table = pd.read_csv(finished / "per_image.csv")
    assert len(table) == report["clean"]["total"] == 140 and table["id"].is_unique
    right = table["clean prediction"] == table["label"]
    assert right.sum() == report["clean"]["count"]
    robust = [column for column in table if column.endswith(" robust") and "worst" not in column]
    assert len(robust) == len(report["measurements"]) == 6
    for measured in report["measurements"]:
        column, after = table[f"{measured['name']} robust"], table[f"{measured['name']} prediction"]
        assert (column == (right & (after == table["label"]))).all()
        assert column.sum() == measured["robust_accuracy"]["count"]
        assert measured["attack_robustness"]["value"] == pytest.approx(column.sum() / right.sum())
    assert table["worst case adaptive robust"].tolist() == table[robust].min(axis=1).tolist()
    assert table["worst case adaptive robust"].sum() == report["adaptive"]["count"]
    corruptions = report["corruptions"]
    assert [each["kind"] for each in corruptions["kinds"]] == ["gaussian_noise", "contrast"]
    assert table["corrupted"].mean() == pytest.approx(corruptions["mean"]["value"])
    assert 0.1 < corruptions["mean"]["value"] < report["clean"]["value"]
    curve = next(each for each in report["curves"] if each["attacker"] == "adaptive")
    counts = [point["count"] for point in curve["accuracy"]]
    assert counts == sorted(counts, reverse=True) and counts[-1] <= 3
    assert len(report["gallery"]) == 8
    assert len({picture["label"] for picture in report["gallery"]}) == 8
    assert not (finished / ".journal").exists()


def test_adversarial_images_are_what_the_report_counts(small_run: Path, finished: Path):
    """In the order of the source, in the ball, and wrong where the report says so."""
    folder, report = finished.parents[1], json.loads((finished / "report.json").read_text())
    table = pd.read_csv(finished / "per_image.csv")
    images = torch.load(folder / "images.pt", weights_only=True)
    assert images.shape == (140, 3, 32, 32) and images.dtype == torch.float32
    source, model = open_source("digits", split="test"), load_checkpoint(small_run)
    rows = [source.ids.tolist().index(name) for name in table["id"]]
    assert source.labels is not None
    labels = torch.from_numpy(source.labels[rows])
    clean = np.stack([resize_image(source.image(row), 32) for row in rows]).transpose(0, 3, 1, 2)
    names = sorted(path.name for path in (folder / "images").iterdir())
    assert names == sorted(table["id"])
    files = [np.array(Image.open(folder / "images" / name)) for name in table["id"]]
    for attacked in (images, torch.from_numpy(np.stack(files).transpose(0, 3, 1, 2)) / 255):
        assert attacked.min() >= 0 and attacked.max() <= 1
        assert (attacked - torch.from_numpy(clean) / 255).abs().max() <= 8 / 255 + 1e-6
        with torch.no_grad():
            right = (model(attacked).argmax(1) == labels).numpy()
        assert (right == table["worst case adaptive robust"]).mean() > 0.97
    assert right.sum() <= report["adaptive"]["count"] + 2
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).numpy()
    assert right.tolist() == (table["worst case adaptive robust"] == 1).tolist()
    claim = (finished / "robustbench.md").read_text()
    for line in ("**Threat Model**: Linf", "**eps**: 8/255", "masked", "pgd-3 (adaptive)"):
        assert line in claim
    for name in ("clean", "adaptive"):
        assert f"{100 * report[name]['value']:.1f}{SPACE}%" in claim


def test_the_same_command_continues_and_replaces_the_images_that_it_wrote(
    small_run: Path, tmp_path: Path
):
    few: dict[str, Any] = {"attacks": Names("fgsm"), "corruptions": Names(), "curves": False}
    folder, out = tmp_path / "images", tmp_path / "report"
    chosen = options(small_run, out, save_images=folder, limit=20, **few)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(AdversarialImages, "write_files", lambda *_: 1 / 0)
        evaluate(chosen)
    assert (out / "report.html").exists() and written(out) and not folder.exists()
    for limit in (20, 10):
        evaluate(replace(chosen, limit=limit))
        assert len(list(folder.iterdir())) == limit and not (out / ".journal").exists()
    read = DataOptions(name="folder", root=folder)
    for other in ({"out": tmp_path / "other"}, {"data": read}, {"save_images": out}):
        with pytest.raises(UserError, match="--save_images: expected a new folder, or one"):
            replace(chosen, **other)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--save_images: expected a new folder, or one"):
        replace(chosen)


def test_without_gcm_there_is_no_sign_of_masking(small_run: Path, finished: Path, report_of: Run):
    report = report_of(small_run, {"conceal": False})
    masked = json.loads((finished / "report.json").read_text())
    assert report["verdict"] == "no sign of masking", report["checks"]
    assert report["oblivious"] == report["adaptive"]
    assert report["twin_clean"] is None and not report["model"]["stages"]
    assert report["adaptive"]["value"] == masked["adaptive"]["value"]


def test_a_random_model_is_judged_on_several_draws(small_run: Path, report_of: Run):
    randomize = {"min_size": 24, "seed": 0}
    changes = {"limit": 40, "draws": 3, "eot": 2, "curves": False}
    report = report_of(small_run, {"conceal": False, "randomize": randomize}, **changes)
    clean, adaptive = report["clean"], report["adaptive"]
    assert len(clean["by_draw"]) == len(adaptive["by_draw"]) == 3
    assert len(set(clean["by_draw"])) > 1
    assert clean["value"] == pytest.approx(sum(clean["by_draw"]) / 3)
    assert adaptive["low"] <= min(adaptive["by_draw"]) <= max(adaptive["by_draw"])
    assert max(adaptive["by_draw"]) <= adaptive["high"]
    assert report["model"]["random"] and check(report, "deterministic") == "warning"
    pgd = report["measurements"][3]
    assert pgd["name"] == "pgd-3 linf 8/255 adaptive"
    assert pgd["settings"]["draws_averaged"] == 2 and not pgd["settings"]["early_stop"]
    assert adaptive["value"] < report["oblivious"]["value"] <= clean["value"]


def test_autoattack_says_which_part_fooled(small_run: Path, report_of: Run):
    changes = {"limit": 12, "attacks": Names("autoattack"), "curves": False}
    changes["epsilon"] = Ratios("16/255")
    report = report_of(small_run, {"conceal": False}, **changes)
    measured = report["measurements"][0]
    parts = measured["settings"]["fooled_first_by"]
    assert list(parts) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert sum(parts.values()) == report["clean"]["count"] - measured["robust_accuracy"]["count"]
    assert parts["apgd-ce"] > 0
    assert check(report, "white box beats square (AutoAttack)") == "ok"


def test_killed_ten_times_the_report_is_the_same(small_run: Path, finished: Path, tmp_path: Path):
    """SIGKILL after a random number of new results and a random moment more.

    The first of the ten evaluations had fewer attacks: PGD for the curves alone.
    """
    chosen, draw = options(small_run, tmp_path / "report"), random.Random(0)
    for kill in range(10):
        before = written(chosen.out)
        process = start(chosen if kill else replace(chosen, attacks=Names("fgsm")))
        wanted = before + draw.randint(0, 2) if kill else 15
        while process.is_alive() and written(chosen.out) < wanted:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -9, "it was to be killed before it was done"
        assert not (chosen.out / "report.json").exists()
    process = start(chosen)
    process.join()
    assert process.exitcode == 0
    assert contents(chosen.out) == contents(finished)


def written(out: Path) -> int:
    return sum(1 for _ in (out / ".journal").glob("*/*.npz"))


def test_two_processes_give_the_same_report(small_run: Path, finished: Path, tmp_path: Path):
    arguments = ["--checkpoint", small_run, "--out", tmp_path / "report", "--attacks", "fgsm,pgd"]
    arguments += ["--steps", 3, "--limit", 140, "--batch_size", 7, "--num_workers", 1]
    arguments += ["--corruptions", "contrast,gaussian_noise"]
    arguments += ["--save_adversarial", tmp_path / "images.pt"]
    done = run_command("inference/evaluate.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "report") == contents(finished)
    expected = torch.load(finished.parents[1] / "images.pt", weights_only=True)
    assert torch.equal(torch.load(tmp_path / "images.pt", weights_only=True), expected)
    assert done.stdout.count("Verdict: masked") == done.stderr.count("; at most about ") == 1


def test_too_low_a_number_fails_after_the_report_is_written(small_run: Path, tmp_path: Path):
    arguments = ["--checkpoint", small_run, "--attacks", "fgsm,pgd", "--steps", 3, "--limit", 64]
    wanted, written = "1", list[dict[str, bytes]]()
    for status in (1, 0):
        out = tmp_path / str(status)
        done = run_command(
            "inference/evaluate.py", *arguments, "--out", out, "--fail_below", wanted
        )
        assert done.returncode == status and "report.html" in done.stdout, done.stderr
        assert done.stderr.count("error: --fail_below: expected an adaptive") == status
        assert "Traceback" not in done.stderr
        first = done.stderr.partition("\n")[0]
        assert re.match(r"6 attacks on 64 images, \d+ for curves on 32; at most about ", first)
        assert "100%" in done.stderr
        written.append(contents(out))
        adaptive = json.loads((out / "report.json").read_text())["adaptive"]
        wanted = f"{adaptive['count']:.0f}/{adaptive['total']}"  # what it has is enough
    assert written[0] == written[1]


MIXING = """
import torch
from torch import nn
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    return lambda images: net(images - images.mean(0)) + 1e-3 * torch.arange(10)
"""


def test_a_failed_evaluation_is_no_number_to_compare(small_run: Path, tmp_path: Path):
    (tmp_path / "net.py").write_text(MIXING)
    done = run_command(
        "inference/evaluate.py",
        *("--model", f"{tmp_path / 'net.py'}:model", "--image_size", 32, "--out", tmp_path / "out"),
        *("--attacks", "fgsm", "--epsilon", "1/1000", "--limit", 32, "--curves", "false"),
        *("--data.name", "digits", "--fail_below", "0"),
    )
    assert (tmp_path / "out" / "report.html").exists() and done.returncode == 1, done.stderr
    assert "--fail_below: expected a number to compare, found: evaluation failed" in done.stderr


def test_a_finished_report_is_made_anew_and_another_seed_gives_another(
    small_run: Path, finished: Path, report_of: Run
):
    report = json.loads((finished / "report.json").read_text())
    other = report_of(small_run, seed=1, curves=False)
    assert other["seed"] == 1 and not other["curves"]
    assert other["data"]["chosen"] == "a stratified draw with seed 1"
    assert other["clean"] != report["clean"] or other["adaptive"] != report["adaptive"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--attacks", "pgd,autoatack"], 1, "'autoatack' (nearest: autoattack)"),
        (["--corruptions", "fog,frost"], 1, "corruptions: expected all, or some of gaussian_noise"),
        (["--epsilon", "8"], 1, "for linf at most 1, as pixels are 0 to 1 (8/255), found 8."),
        (["--epsilon", "eight"], 2, "8/255"),
        (["--epsilon", "0.12345671,0.12345672"], 1, "epsilon: expected radii that differ in"),
        (["--limit", "0"], 1, "--limit: expected at least 1, found 0."),
        (["--seed", "-1"], 1, "seed: expected at least 0, found -1."),
        (["--fail_below", "30"], 1, "--fail_below: expected 0 to 1, found 30."),
        (["--compile", "true", "--model", "resnet18"], 1, "--compile: expected a --checkpoint"),
        (["--compile", "true", "--attacks", "fab"], 1, "--compile: expected fab-t, which can be"),
        (["--image_size", "16"], 1, "--image_size: expected 32, as "),
        (["--save_images", "."], 1, "--save_images: expected a new folder, or one that an"),
        (["--save_adversarial", "no/a.pt"], 1, "no/a.pt: expected the existing folder no"),
        (["--out", "an.png"], 1, "--out: expected a folder, found the file an.png."),
        (["--norm", "l3"], 2, "l3"),
        (["--data.name", "folder", "--data.root", "nowhere"], 1, "nowhere"),
        (["--data.name", "images", "--data.root", "."], 1, "expected images with labels"),
        (["--data.root", "."], 1, "expected --data.name with --data.root"),
        (["--data.label_column", "label"], 1, "expected --data.name with --data.image_column or"),
        (["--data.image_column", "image"], 1, "expected --data.name with --data.image_column or"),
        (["--atacks", "pgd"], 2, "unknown option --atacks; nearest known: attacks."),
    ],
)
def test_a_mistake_is_told_in_a_few_lines(
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
):
    (tmp_path / "an.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    command = ["evaluate.py", "--checkpoint", str(small_run), "--out", "report", *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        run(evaluate, Options)
    error = capsys.readouterr().err
    assert ended.value.code == status
    assert message in error and "Traceback" not in error and len(error.splitlines()) <= 4


def test_a_twin_takes_images_of_the_same_size(small_run: Path):
    data = open_evaluation_data(DataOptions(name="digits"), None, 10, 1, 0)
    with pytest.raises(UserError, match=f"^--twin {small_run}: .* model's 48 px, found 32 px"):
        load_twin(small_run, data, 48)


def test_compiled_it_gives_the_same_numbers(
    small_run: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # torch's own compiler of C++ takes more than a minute, and is not what is tested
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    out = tmp_path / "report"
    evaluate(options(small_run, out, compile=True, curves=False, corruptions=Names()))
    found, expected = (json.loads((each / "report.json").read_text()) for each in (out, finished))
    assert found["settings"].pop("compile") and not expected["settings"].pop("compile")
    for name in ("model", "clean", "twin_clean", "oblivious", "adaptive", "measurements"):
        assert found[name] == expected[name]
    table, whole = (pd.read_csv(folder / "per_image.csv") for folder in (out, finished))
    pd.testing.assert_frame_equal(table, whole[list(table)])


def test_a_trn_cannot_be_compiled(tmp_path: Path):
    classifier = RobustClassifier(
        class_names=[str(digit) for digit in range(10)],
        backbone="test_convnext",
        image_size=32,
        restore={"width": 4, "depth": 1},
    )
    classifier.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match=r"--compile: expected a model without TRN, found .*run"):
        evaluate(
            options(
                tmp_path / "run", tmp_path / "report", data=DataOptions(name="digits"), compile=True
            )
        )


def test_a_run_without_a_recipe_needs_the_data_named(small_run: Path, tmp_path: Path):
    shutil.copytree(small_run, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match=r"recipe\.yaml: expected .* or --data\.name"):
        evaluate(options(tmp_path / "run", tmp_path / "report"))
    with pytest.raises(ValueError, match=r"expected classes of the model .*, found cat, dog"):
        two_classes(tmp_path / "data")
        data = DataOptions(name="folder", root=tmp_path / "data")
        evaluate(options(tmp_path / "run", tmp_path / "report", data=data))


def two_classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "test" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(folder / "test" / name / f"{number}.png")
