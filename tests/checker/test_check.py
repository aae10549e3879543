"""Faulty packages: each gets its own message; a sound one passes."""

import io
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from PIL import Image
from rich.console import Console

from robust_submission.checker.host import Findings, Images, Rules, examine, needless
from robust_submission.checker.sandbox import Limits, Run
from robust_submission.checker.verdict import Verdict
from robust_submission.checker.verdicts import judge
from submission.check import Options, read_labelled, table
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


def faulty(*changes: tuple[str, str]) -> str:
    code = SOUND
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    return code


MUCH = "torch.ops.aten.mm(images.new_ones(110, 100), images.new_ones(100, 100)); "
FAULTS: dict[str, tuple[str, dict[str, str]]] = {
    "too many parameters, a softmax, nothing to train": (
        faulty(
            ("torch.manual_seed(0)", "self.more = nn.Parameter(torch.zeros(31000000))"),
            ("nn.Linear(4, 5)\n", "nn.Linear(4, 5)\n        self.requires_grad_(False)\n"),
            (FORWARD, FORWARD + ".softmax(1)"),
        ),
        {
            "parameters": "fewer than 30 M 31.00 M",
            "trainable": "at least one parameter 0 of 31.00 M",
            "logits": "probabilities that sum to 1 leave out the softmax",
            "parallel": "RuntimeError",
        },
    ),
    "too many operations, unseen by ptflops; a thousand outputs": (
        faulty((FORWARD, MUCH + FORWARD), ("nn.Linear(4, 5)", "nn.Linear(4, 1000)")),
        {"operations": "0.00113 G run by torch", "output": "2 x 1000"},
    ),
    "random": (
        faulty((FORWARD, FORWARD + " + torch.rand(1)")),
        {"repeat": "not from a global generator", "modes": "", "batch": ""},
    ),
    "needs timm": (
        faulty(("import torch\n", "import torch\nimport timm.layers\n")),
        {"packages": "torch and numpy alone needs timm (model.py:3)"},
    ),
    "memory": (
        faulty(("torch.manual_seed(0)", "self.all = [bytearray(10 ** 8) for _ in range(1000)]")),
        {"memory": "at most 1 GB of memory more asked for, while loading the model"},
    ),
    "network": (
        faulty(("torch.manual_seed(0)", "import urllib.request as r; r.urlopen('http://a.test/')")),
        {"network": "no network a call to a.test"},
    ),
    "it ends the process": (
        faulty(("torch.manual_seed(0)", "import os; os._exit(3)")),
        {"loading": "status 3, while loading the model"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_own_message(tmp_path: Path, fault: str):
    code, expected = FAULTS[fault]
    limits = Limits(seconds=100, memory=1e9 if fault == "memory" else 6e9)
    rules = Rules(num_classes=5, image_size=16, max_operations=1e6, limits=limits)
    found = verdicts(make(tmp_path / "faulty.zip", code, notes__pyc=b""), rules)
    assert {each.check for each in found.values() if each.status == "fail"} == expected.keys()
    for check, words in expected.items():
        each = found[check]
        assert each.fix and words in f"{each.expected} {each.found} {each.fix}", each
    assert found["archive"].status == "note" and "notes.pyc" in found["archive"].found


ERRORS = {
    ("load", "TypeError", "missing 'size'"): ("loading", "no arguments", "missing 'size'"),
    ("load", "FileNotFoundError", "w.pth"): ("loading", "w.pth", "os.path.dirname(__file__)"),
    ("load", "ContractError", "no class Model"): ("loading", "no class Model", "define class"),
    ("outputs", "ValueError", "bad shape"): ("output", "ValueError: bad shape", "float tensor"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_has_its_own_message(error: tuple[str, str, str]):
    stage, kind, message = error
    words = {"kind": kind, "message": message, "place": "model.py:7", "module": ""}
    results = {"load": True, "parameters": {"total": 9, "trainable": 9}, "contacts": []}
    run = Run(result={**results, stage: {"error": words}}, stage=stage, found="", output="")
    judged = judge(Findings(kind=".zip", files=["model.py"], run=run), RULES)
    check, *expected = ERRORS[error]
    found = next(each for each in judged if each.check == check)
    assert found.status == "fail"
    assert all(word in f"{found.expected} {found.found} {found.fix}" for word in expected), found


@pytest.mark.parametrize("forged", [{}, {"load": True}, {"load": {"error": 3}}, {"load": [1]}])
def test_a_forged_result_is_no_pass(forged: dict[str, object]):
    run = Run(result=forged, stage="load", found="", output="")
    (judged,) = judge(Findings(kind=".onnx", files=["model.onnx"], run=run), RULES)
    assert judged.check == "loading" and judged.status == "fail"


@pytest.mark.parametrize(("moved", "status"), [(0.0, "pass"), (9e-5, "pass"), (2e-4, "fail")])
def test_modes_and_batches_must_agree(moved: float, status: str):
    results = {"load": True, "parameters": {"total": 9, "trainable": 9}, "modes": moved}
    results["stability"] = {"repeat": 0.0, "batch": moved}
    run = Run(result=results, stage="", found="", output="")
    judged = judge(Findings(kind=".zip", files=["model.py"], run=run), RULES)
    found = {each.check: each.status for each in judged}
    assert found["modes"] == found["batch"] == status and found["repeat"] == "pass"


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


def flat_images(*levels: int) -> Images:
    pixels = np.full((len(levels), 16, 16, 3), 0, np.uint8)
    pixels += np.uint8(levels)[:, None, None, None]
    return Images(pixels=pixels, labels=np.zeros(len(levels), np.int64))


def test_one_image_is_enough(tmp_path: Path):
    found = verdicts(make(tmp_path / "sound.zip", SOUND), images=flat_images(100))
    assert found["output"].status == "pass" and found["output"].found == "2 x 5"


def test_every_given_image_must_have_finite_outputs(tmp_path: Path):
    odd = "abs(images.mean((1, 2, 3)) - 200 / 255) < 0.01"
    code = changed(FORWARD, f"return self.linear(features).masked_fill(({odd})[:, None], 1e999)")
    found = verdicts(make(tmp_path / "nan.zip", code), images=flat_images(100, 200, 100))
    assert found["values"].status == "fail" and "for images" in found["values"].found


def onnx_file(path: Path, body: str, weights: np.ndarray) -> Path:
    """Images N x 3 x 16 x 16 by `weights` w, 768 x 5, in ONNX's own text."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]>'
        "main (float[N, 3, 16, 16] images) => (float[N, 5] logits)"
        "<float s = {0.1}, uint8 z = {3}, int8 y = {0}> { f = Flatten (images)\n" + body + "}"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("logits = MatMul (f, w)", np.float32),
        ("d = DequantizeLinear (w, s, y) logits = MatMul (f, d)", np.int8),
        ("d = Cast <to = 1> (w) logits = MatMul (f, d)", np.int64),
        (
            "q = QuantizeLinear (f, s, z) m = MatMulInteger (q, w, z)logits = Cast <to = 1> (m)",
            np.int8,
        ),
        (
            "q = QuantizeLinear (f, s, z) m = QLinearMatMul (q, s, z, w, s, y, s, z)"
            "logits = DequantizeLinear (m, s, z)",
            np.int8,
        ),
        ("logits = com.microsoft.FusedMatMul (f, w)", np.float32),
        ("m = MatMul (f, w) logits = com.microsoft.Gelu (m)", np.float32),
    ],
)
def test_products_of_onnx_count_whatever_their_kind(tmp_path: Path, body: str, kind: type):
    weights = np.random.default_rng(0).integers(-5, 5, (768, 5)).astype(kind)
    found = verdicts(onnx_file(tmp_path / "a.onnx", body, weights))
    assert found["parameters"].found == str(768 * 5 + 3)  # with s, z and y
    expected = f"{768 * 5 / 1e9:.3g} G in the graph"
    assert found["operations"].found == expected + "; not counted: Gelu" * ("Gelu" in body)


@pytest.mark.parametrize(
    "body",
    [
        "g = Constant <value_floats = [0.1, 0.2, 0.3, 0.4, 0.5]> () m = MatMul (f, w)"
        "h = Constant <value_float = 0.6> () k = Mul (m, g) logits = Add (k, h)",
        "m = MatMul (f, w) c = Constant <value = bool {1}> () logits = If (c) <"
        "then_branch = a () => (float[N, 5] p) <float[5] g = {0, 1, 2, 3, 4}> { p = Add (m, g) },"
        "else_branch = b () => (float[N, 5] q) <float[1] g = {7}> { q = Add (m, g) }>",
    ],
)
def test_numbers_of_onnx_count_wherever_they_stand(tmp_path: Path, body: str):
    found = verdicts(onnx_file(tmp_path / "a.onnx", body, np.ones((768, 5), np.float32)))
    assert found["parameters"].found == str(768 * 5 + 3 + 6)  # with s, z and y


def test_a_model_that_never_ends_is_stopped(tmp_path: Path):
    code = changed("torch.manual_seed(0)", "import time\n        while True: time.sleep(0.01)")
    rules = Rules(num_classes=5, image_size=16, limits=Limits(seconds=6))
    found = verdicts(make(tmp_path / "endless.zip", code), rules)
    assert found["time"].status == "fail" and found["time"].found.startswith(
        "still running after 6 s"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sub/model.py", ("sub/model.py, a folder too deep", "zip from inside")),
        ("network.py", ("network.py", "add a model.py")),
        ("a/./model.py", ("a/model.py, a folder too deep", "zip from inside")),
        ("../model.py", ("'../model.py', which leaves it", "zip from inside")),
    ],
)
def test_layout(tmp_path: Path, name: str, words: tuple[str, str]):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, SOUND)
    found = verdicts(tmp_path / "a.zip")
    assert list(found) == ["archive"] and found["archive"].status == "fail"
    assert words[0] in found["archive"].found and words[1] in found["archive"].fix


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
    good = verdicts(make(tmp_path / "bgr.zip", COLOUR), rules, images)
    assert {each.status for each in good.values()} == {"pass"}
    assert "100.0% as BGR, 0.0% as RGB" in good["channels"].found
    code = COLOUR.replace("blue, green, red", "red, green, blue")
    bad = verdicts(make(tmp_path / "rgb.zip", code), rules, images)["channels"]
    assert bad.status == "fail" and "0.0% as BGR, 100.0% as RGB" in bad.found
    assert "flip" in bad.fix


def test_a_model_that_expects_0_to_255_is_seen_in_the_accuracy(colours: Path):
    images = read_labelled(colours, 16, limit=40, seed=0)
    assert images.labels is not None
    labels = {"bgr": [0] * 40, "rgb": [0] * 40, "bgr255": images.labels.tolist()}
    results = {"load": True, "parameters": {"total": 9, "trainable": 9}, "outputs": {"shape": []}}
    outputs = {"shape": [2, 2], "dtype": "float32", "finite": True, "probabilities": False}
    results |= {"outputs": {**outputs, "extremes": True}}
    results |= {"reactions": {"labels": labels, "grey": False}}
    run = Run(result=results, stage="", found="", output="")
    findings = Findings(kind=".zip", files=["model.py"], run=run, images=images)
    found = {each.check: each for each in judge(findings, Rules(num_classes=2, image_size=16))}
    assert found["range"].status == "fail"
    assert "50.0% in 0 to 1, 100.0% in 0 to 255" in found["range"].found
    assert found["channels"].status == "note" and "no clear difference" in found["channels"].found


def test_markup_in_a_message_or_a_name_is_text():
    written = io.StringIO()
    cells = {"expected": "[b]", "found": r"bad \[/INST]", "fix": "\\"}
    drawn = table("a[/red].zip", [Verdict(check="loading", status="fail", **cells)])
    Console(width=200, file=written).print(drawn)
    assert all(text in written.getvalue() for text in ("a[/red].zip", "[b]", r"bad \[/INST]"))


def test_git_and_its_like_are_needless():
    files = ["model.py", ".git/config", "a/.git", "weights.git", "__MACOSX/x", "a.LOG"]
    assert needless(files) == [".git/config", "a/.git", "__MACOSX/x", "a.LOG"]


def test_the_command_prints_the_table_and_its_status_tells(tmp_path: Path):
    make(tmp_path / "bad.zip", changed("import torch\n", "import torch, timm\n"))
    common = ("--num_classes", 5, "--image_size", 16)
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
