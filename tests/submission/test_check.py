"""Faulty packages: each gets its own message; a sound one passes."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from submission.check import Options, read_labelled
from submission.examination import Images, Rules, examine
from submission.isolation import Limits
from submission.verdict import Verdict
from submission.verdicts import judge
from tests.conftest import run_command

SOUND = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(4, 5)

    def forward(self, images):
        images = images.flip(1)
        features = torch.relu(self.convolution(images)).mean((2, 3))
        return self.linear(features)
"""
RULES = Rules(num_classes=5, image_size=16, max_operations=1e6, limits=Limits(seconds=100))


def make(path: Path, code: str, **others: str | bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.py", code)
        for name, content in others.items():
            archive.writestr(name.replace("__", "."), content)
    return path


def changed(old: str, new: str) -> str:
    assert old in SOUND
    return SOUND.replace(old, new)


def verdicts(path: Path, rules: Rules = RULES, images: Images | None = None) -> dict[str, Verdict]:
    return {verdict.check: verdict for verdict in judge(examine(path, rules, images), rules)}


def test_a_sound_package_passes_every_check(tmp_path: Path):
    found = verdicts(make(tmp_path / "sound.zip", SOUND))
    assert {each.check for each in found.values() if each.status != "pass"} == {"channels", "range"}
    assert set(found) >= {"loading", "parameters", "trainable", "operations", "output", "parallel"}
    convolution, linear = 16 * 16 * 3 * 9 * 4, 4 * 5
    assert f"{(convolution + linear) / 1e9:.3g} G run by torch" in found["operations"].found
    assert found["parameters"].found == str(3 * 4 * 9 + 4 + 4 * 5 + 5)


FORWARD = "return self.linear(features)"
FAULTS = {
    "too many parameters": (
        changed("torch.manual_seed(0)", "self.more = nn.Parameter(torch.zeros(31000000))"),
        ("parameters", "31.00 M", "fewer than 30 M"),
    ),
    "too many operations, unseen by ptflops": (
        changed(
            FORWARD,
            "torch.ops.aten.mm(images.new_ones(110, 100), images.new_ones(100, 100)); " + FORWARD,
        ),
        ("operations", "0.00113 G run by torch", "fewer than 0.001 G"),
    ),
    "softmax": (
        changed(FORWARD, FORWARD + ".softmax(1)"),
        ("logits", "probabilities that sum to 1", "leave out the softmax"),
    ),
    "a thousand outputs": (
        changed("nn.Linear(4, 5)", "nn.Linear(4, 1000)"),
        ("output", "2 x 1000", "2 x 5"),
    ),
    "needs timm": (
        changed("import torch\n", "import torch\nimport timm.layers\n"),
        ("packages", "needs timm (model.py:3)", "torch and numpy alone"),
    ),
    "random": (
        changed(FORWARD, FORWARD + " + torch.rand(1)"),
        ("repeat", "differ by", "not from a global generator"),
    ),
    "nothing to train": (
        changed(
            "self.linear = nn.Linear(4, 5)",
            "self.linear = nn.Linear(4, 5); self.requires_grad_(False)",
        ),
        ("trainable", "0 of 137", "at least one parameter"),
    ),
    "dropout that waits for eval()": (
        changed(FORWARD, "return self.linear(nn.functional.dropout(features, 0.5, self.training))"),
        ("modes", "differ by", "nobody promises eval()"),
    ),
    "statistics over the batch": (
        changed(FORWARD, "return self.linear(features - features.mean(0))"),
        ("batch", "differ by", "no statistics over the batch"),
    ),
    "memory": (
        changed("torch.manual_seed(0)", "self.all = [bytearray(10 ** 8) for _ in range(1000)]"),
        ("memory", "more asked for, while loading model.py", "at most 1 GB"),
    ),
    "network": (
        changed("torch.manual_seed(0)", "import urllib.request as r; r.urlopen('http://a.test/w')"),
        ("network", "a.test", "no network"),
    ),
    "weights outside": (
        changed("torch.manual_seed(0)", "torch.load('weights.pth')"),
        ("loading", "weights.pth", "os.path.dirname(__file__)"),
    ),
    "arguments": (
        changed("def __init__(self):", "def __init__(self, size):"),
        ("loading", "TypeError", "no arguments"),
    ),
    "it ends the process": (
        changed("torch.manual_seed(0)", "import os; os._exit(3)"),
        ("loading", "status 3, while loading", "do not end the process"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_own_message(tmp_path: Path, fault: str):
    code, (check, *words) = FAULTS[fault]
    limits = Limits(seconds=100, memory=1e9 if fault == "memory" else 6e9)
    rules = Rules(num_classes=5, image_size=16, max_operations=1e6, limits=limits)
    found = verdicts(make(tmp_path / "faulty.zip", code), rules)
    failed = {each.check for each in found.values() if each.status == "fail"}
    also = {"random": {"modes", "batch"}, "dropout that waits for eval()": {"repeat", "batch"}}
    parallel = {"parallel"} if fault == "nothing to train" else set()
    assert failed - also.get(fault, set()) == {check} | parallel
    text = f"{found[check].expected} {found[check].found} {found[check].mend}"
    assert all(word in text for word in words), text


def test_a_backward_inside_the_model_counts(tmp_path: Path):
    inner = """
        with torch.enable_grad():
            inner = images.detach().requires_grad_()
            score = torch.relu(self.convolution(inner)).sum()
            images = images + 0 * torch.autograd.grad(score, inner)[0]
"""
    code = changed("        images = images.flip(1)\n", "        images = images.flip(1)" + inner)
    found = verdicts(make(tmp_path / "inner.zip", code))
    forward = 16 * 16 * 3 * 9 * 4
    assert f"{(3 * forward + 20) / 1e9:.3g} G run by torch" in found["operations"].found


def test_a_model_that_never_ends_is_stopped(tmp_path: Path):
    code = changed("torch.manual_seed(0)", "import time\n        while True: time.sleep(0.01)")
    rules = Rules(num_classes=5, image_size=16, limits=Limits(seconds=8))
    found = verdicts(make(tmp_path / "endless.zip", code), rules)
    assert found["time"].status == "fail" and found["time"].found.startswith("no end after 8 s")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sub/model.py", ("sub/model.py, a folder too deep", "zip from inside")),
        ("network.py", ("network.py", "add a model.py")),
        ("../model.py", ("'../model.py', which leaves it", "zip from inside")),
    ],
)
def test_layout(tmp_path: Path, name: str, words: tuple[str, str]):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, SOUND)
    found = verdicts(tmp_path / "a.zip")
    assert list(found) == ["archive"] and found["archive"].status == "fail"
    assert words[0] in found["archive"].found and words[1] in found["archive"].mend


def test_needless_files_are_noted(tmp_path: Path):
    path = make(tmp_path / "a.zip", changed(FORWARD, "raise ValueError"), notes__pyc=b"")
    found = verdicts(path)
    assert found["archive"].status == "note" and "notes.pyc" in found["archive"].found
    assert found["output"].status == "fail" and "ValueError" in found["output"].found


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 blueish and 30 reddish images in two class folders."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (folder / name).mkdir()
        for number in range(30):
            pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


COLOUR = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        blue, green, red = images.mean((2, 3)).unbind(1)
        return torch.stack([blue, red], 1) * self.weight
"""


def test_rgb_in_place_of_bgr_is_seen_in_the_accuracy(tmp_path: Path, colours: Path):
    rules = Rules(num_classes=2, image_size=16)
    images = read_labelled(colours, 16, limit=40, seed=0)
    assert images.pixels.shape == (40, 16, 16, 3) and (np.bincount(images.labels) == 20).all()
    good = verdicts(make(tmp_path / "bgr.zip", COLOUR), rules, images)["channels"]
    assert good.status == "pass" and "100.0% as BGR, 0.0% as RGB" in good.found
    code = COLOUR.replace("blue, green, red", "red, green, blue")
    bad = verdicts(make(tmp_path / "rgb.zip", code), rules, images)["channels"]
    assert bad.status == "fail" and "0.0% as BGR, 100.0% as RGB" in bad.found
    assert "flip" in bad.mend


def test_a_model_that_expects_0_to_255_is_seen_in_the_accuracy(tmp_path: Path, colours: Path):
    code = COLOUR.replace("* self.weight", "* 0.01 + images.new_tensor([0.02, 0.0])")
    images = read_labelled(colours, 16, limit=40, seed=0)
    found = verdicts(make(tmp_path / "a.zip", code), Rules(num_classes=2, image_size=16), images)
    assert (
        found["range"].status == "fail"
        and "50.0% in 0 to 1, 100.0% in 0 to 255" in found["range"].found
    )


def test_the_command_prints_the_table_and_its_status_tells(tmp_path: Path):
    make(tmp_path / "good.zip", SOUND)
    make(tmp_path / "bad.zip", changed("import torch\n", "import torch, timm\n"))
    common = ("--num_classes", 5, "--image_size", 16)
    good = run_command("submission/check.py", tmp_path / "good.zip", *common)
    assert good.returncode == 0 and "parameters" in good.stdout
    bad = run_command("submission/check.py", tmp_path / "bad.zip", *common)
    assert bad.returncode == 1 and "needs timm" in bad.stdout
    assert bad.stderr.splitlines()[-1].endswith("bad.zip: 1 check failed: packages.")


@pytest.mark.parametrize(("name", "found"), [("none.zip", "nothing there"), ("a.tar", ".tar")])
def test_what_is_no_submission(tmp_path: Path, name: str, found: str):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=found):
        examine(tmp_path / name, RULES)


def test_options_are_checked():
    with pytest.raises(ValueError, match="--timeout: expected more than 0"):
        Options(file=Path("a.zip"), timeout=0)
