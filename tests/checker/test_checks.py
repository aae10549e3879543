"""Small submissions with a fault each, and the check that must fail; a sound one passes all."""

import os
import socket
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
import torch
from PIL import Image
from torch import nn

from robust_submission.checker import sandbox
from robust_submission.checker.checks import check_trial
from robust_submission.checker.container import run_contained
from robust_submission.checker.host import Images, Rules, Trial, read_labelled, try_submission
from robust_submission.checker.probes import ProbeError, Reactions, Stage, TrialResult
from robust_submission.checker.sandbox import Limits, Run, Walls, namespaces
from robust_submission.checker.table import RuleResult
from robust_submission.checker.worker import compare_modes
from robust_submission.cli.errors import UserError
from tests.conftest import running

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
CONVOLUTION, LINEAR = 16 * 16 * 3 * 9 * 4, 4 * 5  # multiply-adds at 16 px
INIT, FORWARD = "torch.manual_seed(0)", "return self.linear(features)"


RULES = Rules(num_classes=5, image_size=16, max_operations=1e6, limits=Limits(seconds=100))


def changed(*changes: tuple[str, str]) -> str:
    code = SOUND
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    return code


def make(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return path


def check(path: Path, images: Images | None = None, rules: Rules = RULES) -> dict[str, RuleResult]:
    verdicts = check_trial(try_submission(path, rules, images), rules)
    return {verdict.check: verdict for verdict in verdicts}


def words(verdict: RuleResult) -> str:
    return f"{verdict.expected} {verdict.found} {verdict.fix}"


def flat_images(*levels: int) -> Images:
    pixels = np.full((16, 16, 3, len(levels)), levels, np.uint8).transpose(3, 0, 1, 2)
    return Images(pixels=pixels, labels=np.arange(len(levels)) % 2)


def test_a_sound_package_passes_every_check_with_one_image(tmp_path: Path):
    """Its own modules come first, whatever ours are called, and ours cannot be imported."""
    hidden = """
        import importlib.util, sys, probes
        assert probes.own and importlib.util.find_spec("robust_submission") is None
        assert not [name for name in sys.modules if "checker" in name]
"""
    code = changed((INIT, INIT + hidden))
    found = check(make(tmp_path / "a.zip", model__py=code, probes__py="own = 1"), flat_images(100))
    statuses = {name: each.status for name, each in found.items()}
    assert statuses.pop("channels") == statuses.pop("trust") == "note"
    assert set(statuses.values()) == {"pass"}
    names = "archive loading parameters trainable operations output type values logits repeat"
    assert " ".join(statuses) == f"{names} batch modes parallel range"
    assert f"{(CONVOLUTION + LINEAR) / 1e9:.3g} G run by torch" in found["operations"].found
    assert found["parameters"].found == str(3 * 4 * 9 + 4 + 4 * 5 + 5)


MUCH = "torch.ops.aten.mm(images.new_ones(110, 100), images.new_ones(100, 100)); "
FORGE = """import os
        for number in os.listdir("/proc/self/fd"):
            try: os.pwrite(int(number), b'{"loaded": true}', 0)
            except OSError: pass
        os._exit(0)
"""
WRONG = """import gc
        for each in gc.get_objects():
            if type(each).__name__ == "TrialResult": each.uncounted = 1
"""
FAULTS: dict[str, tuple[str, dict[str, str]]] = {
    "too many parameters, a softmax, nothing to train": (
        changed(
            (INIT, "self.more = nn.Parameter(torch.zeros(31000000))"),
            ("nn.Linear(4, 5)\n", "nn.Linear(4, 5)\n        self.requires_grad_(False)\n"),
            (FORWARD, FORWARD + ".softmax(1)"),
        ),
        {
            "parameters": "fewer than 30 M 31.00 M",
            "trainable": "at least one parameter 0 of 31.00 M",
            "logits": "probabilities that sum to 1 remove the softmax",
            "parallel": "RuntimeError",
        },
    ),
    "too many operations, unseen by ptflops; a thousand outputs": (
        changed((FORWARD, MUCH + FORWARD), ("nn.Linear(4, 5)", "nn.Linear(4, 1000)")),
        {"operations": "0.00113 G run by torch", "output": "2 x 1000 return one logit per class"},
    ),
    "random": (
        changed((FORWARD, FORWARD + " + torch.rand(1)")),
        {"repeat": "not from a global generator", "modes": "", "batch": ""},
    ),
    "infinite for one image; half precision": (
        changed(
            ("images = images.flip(1)", "odd = abs(images.mean((1, 2, 3)) - 200 / 255) < 0.01"),
            (FORWARD, FORWARD + ".masked_fill(odd[:, None], 1e999).half()"),
        ),
        {"values": "NaN or infinity for images", "type": "float32 float16"},
    ),
    "an error for one image": (
        changed(("images = images.flip(1)", "assert not (images * 255 == 200).any()")),
        {"values": "AssertionError:  (model.py:13)"},
    ),
    "a package that is not allowed": (
        changed(("import torch\n", "import torch\nimport timm.layers\n")),
        {"packages": "torch and numpy alone needs timm (model.py:3)"},
    ),
    "memory": (
        changed((INIT, "self.all = [bytearray(10 ** 8) for _ in range(1000)]")),
        {"memory": "at most 1 GB of memory more requested, while loading the model"},
    ),
    "network": (
        changed((INIT, "import urllib.request as r; r.urlopen('http://a.test/')")),
        {"network": "no use of a network a call to a.test"},
    ),
    "an endless loop": (
        changed((INIT, "while True: pass")),
        {"time": "an end within 8 s still running after 8 s, while"},
    ),
    "it ends the process": (
        changed((INIT, "import os; os._exit(3)")),
        {"loading": "status 3, while loading the model"},
    ),
    "a forged result": (
        changed((INIT, FORGE)),
        {"loading": "it ended by itself with status 0, while loading the model"},
    ),
    "a result of the wrong form": (
        changed((INIT, WRONG)),
        {"loading": "a result that no worker writes (uncounted: Input should be a valid array)"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_its_check(tmp_path: Path, fault: str):
    code, expected = FAULTS[fault]
    path = make(tmp_path / "faulty.zip", model__py=code, notes__pyc="")
    limits = Limits(seconds=8 if "loop" in fault else 100, memory=1e9 if fault == "memory" else 6e9)
    found = check(path, flat_images(100, 100, 100, 100, 200, 100), replace(RULES, limits=limits))
    assert {each.check for each in found.values() if each.status == "fail"} == expected.keys()
    for name, part in expected.items():
        assert found[name].fix and part in words(found[name])
    assert found["archive"].status == "note" and "notes.pyc" in found["archive"].found


HARM = """import os, subprocess, sys
        for name in ("environ", "mem"):
            try: open("/proc/%d/" + name, "rb").read(1)
            except OSError: pass
            else: raise AssertionError(name)
        subprocess.Popen(["sleep", "%s"], start_new_session=True)
        for _ in range(3000):
            os.mkdir("deep")
            os.chdir("deep")
"""
BREAK_OUT = """
        assert os.getppid() == 0
        call = "import socket; socket.create_connection(('127.0.0.1', %d), 5)"
        assert subprocess.run([sys.executable, "-S", "-c", call], capture_output=True).returncode
"""


@pytest.mark.parametrize("shut_in", [True, False])
def test_a_model_reaches_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shut_in: bool
):
    """Neither the parent nor its files and, in namespaces, no network either."""
    if not shut_in:
        monkeypatch.setattr(sandbox, "namespaces", tuple)
    elif not namespaces():
        pytest.skip("Linux allows no namespaces here")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    pause = f"1000.{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        hostile = HARM % (os.getpid(), pause) + shut_in * (BREAK_OUT % server.getsockname()[1])
        code = changed((INIT, f"{INIT}\n        {hostile}"))
        found = check(make(tmp_path / "a.zip", model__py=code))
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not [each for each in found.values() if each.status == "fail"]
    assert ("in reach" in found["trust"].found) != shut_in
    assert not running(pause) and not [*(tmp_path / "temporary").iterdir()]


INNER = """with torch.enable_grad():
            inner = images.detach().requires_grad_()
            score = torch.relu(self.convolution(inner)).sum()
            images = images + 0 * torch.autograd.grad(score, inner)[0]"""


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ("images = images.flip(1)", INNER, 3 * CONVOLUTION + LINEAR),
        (
            FORWARD,
            f"with torch.inference_mode(): return {MUCH[:-2]}[:1, :5]",
            CONVOLUTION + 1100000,
        ),
    ],
    ids=["a backward pass inside the model", "inference mode"],
)
def test_what_ptflops_does_not_see_counts(tmp_path: Path, old: str, new: str, count: int):
    found = check(make(tmp_path / "a.zip", model__py=changed((old, new))))
    assert f"{count / 1e9:.3g} G run by torch" in found["operations"].found


def synthetic(
    images: Images | None = None, walls: Walls = "namespaces", strange: str = "", **found: object
) -> dict[str, RuleResult]:
    """The verdicts on a trial that found this."""
    result = TrialResult(**({"loaded": True, "parameters": 9} | found))  # pyright: ignore[reportArgumentType]
    run = Run(end="exited", found="", stage="load", output="", walls=walls)
    others = {"strange": strange.split(), "result": result, "images": images}
    trial = Trial(kind=".zip", files=["model.py"], run=run, **others)  # pyright: ignore[reportArgumentType]
    return {verdict.check: verdict for verdict in check_trial(trial, RULES)}


@pytest.mark.parametrize(
    ("stage", "kind", "message", "check", "parts"),
    [
        (
            "load",
            "TypeError",
            "no 'size'",
            "loading",
            "takes no arguments TypeError: no 'size' (m:7)",
        ),
        ("load", "FileNotFoundError", "w.pth", "loading", "w.pth (m:7) open files relative to os."),
        (
            "load",
            "ContractError",
            "no class Model",
            "loading",
            "no class Model define class Model(",
        ),
        ("outputs", "ValueError", "bad", "output", "ValueError: bad (m:7) accept a float"),
        ("modes", "ValueError", "bad mode", "modes", "ValueError: bad mode (m:7) eval() may not"),
    ],
)
def test_each_error_has_its_own_message(
    stage: str, kind: str, message: str, check: str, parts: str
):
    error = ProbeError(kind=kind, message=message, place="m:7", module="")
    found = synthetic(loaded=stage != "load", errors={Stage[stage.upper()]: error})[check]
    assert found.status == "fail" and parts in words(found)


@pytest.mark.parametrize(
    ("walls", "strange", "parts"),
    [
        ("namespaces", "", None),
        ("container", "model.py", None),
        (
            "namespaces",
            "model.py layers.so",
            "code of others, model.py check what you distrust with",
        ),
        ("none", "", "refused namespaces: its network and processes were in reach check what you"),
        ("none", "model.py", "model.py; Linux refused"),
    ],
)
def test_code_of_others_gets_advice_in_the_last_line(walls: Walls, strange: str, parts: str | None):
    found = synthetic(walls=walls, strange=strange)
    assert ("trust" in found) == (parts is not None)
    if parts:
        assert [*found][-1] == "trust" and found["trust"].status == "note"
        assert parts in words(found["trust"])


@pytest.mark.parametrize(("moved", "status"), [(0.0, "pass"), (9e-5, "pass"), (2e-4, "fail")])
def test_modes_and_batches_must_agree(moved: float, status: str):
    found = synthetic(modes=moved, repeat=0.0, batch=moved)
    assert found["modes"].status == found["batch"].status == status
    assert found["repeat"].status == "pass"


def test_comparing_modes_leaves_the_model_as_it_is():
    """Train mode changes a batch norm's statistics; one part is in a mode of its own."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = np.random.default_rng(0).random((4, 3, 4, 4), dtype=np.float32)
    assert compare_modes(model, images) > 0.01
    assert [part.training for part in model] == [False, True, True, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_expects_0_to_255_is_seen_in_the_accuracy():
    labels = np.arange(40) % 2
    images = Images(pixels=np.zeros((40, 16, 16, 3), np.uint8), labels=labels)
    wrong = [0] * 40
    seen = Reactions(bgr=wrong, rgb=wrong, bgr255=labels.tolist(), finite=True, grey=False)
    found = synthetic(images, reactions=seen)
    assert found["range"].status == "fail"
    assert "50.0% in 0 to 1, 100.0% in 0 to 255" in found["range"].found
    assert found["channels"].status == "note" and "no clear difference" in found["channels"].found


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


def test_rgb_in_place_of_bgr_is_seen_in_the_accuracy(tmp_path: Path):
    """By 30 blueish and 30 reddish images in two class folders."""
    rng = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(tmp_path / "colours" / name / f"{number}.png")
    with pytest.raises(ValueError, match=r"a folder for each of the 3 classes .*, found 2"):
        read_labelled(tmp_path / "colours", 16, 3, limit=40, seed=0)
    images = read_labelled(tmp_path / "colours", 16, 2, limit=40, seed=0)
    assert images.labels is not None and images.pixels.shape == (40, 16, 16, 3)
    assert (np.bincount(images.labels) == 20).all()
    two = Rules(num_classes=2, image_size=16)
    good = check(make(tmp_path / "bgr.zip", model__py=COLOUR), images, two)
    assert {name for name, each in good.items() if each.status != "pass"} == {"trust"}
    assert "100.0% as BGR, 0.0% as RGB" in good["channels"].found
    code = COLOUR.replace("blue, green, red", "red, green, blue")
    bad = check(make(tmp_path / "rgb.zip", model__py=code), images, two)["channels"]
    assert bad.status == "fail" and "0.0% as BGR, 100.0% as RGB flip them" in words(bad)


FLOATS = (
    "g = Constant <value_floats = [0.1, 0.2, 0.3, 0.4, 0.5]> () m = MatMul (f, w)"
    "h = Constant <value_float = 0.6> () k = Mul (m, g) logits = Add (k, h)"
)
BRANCHES = (
    "m = MatMul (f, w) c = Constant <value = bool {1}> () logits = If (c) <"
    "then_branch = a () => (float[N, 5] p) <float[5] g = {0, 1, 2, 3, 4}> { p = Add (m, g) },"
    "else_branch = b () => (float[N, 5] q) <float[1] g = {7}> { q = Add (m, g) }>"
)
QUANTIZED = "q = QuantizeLinear (f, s, z) "
INTEGERS = QUANTIZED + "m = MatMulInteger (q, w, z) logits = Cast <to = 1> (m)"
LINEAR_INTEGERS = (
    QUANTIZED + "m = QLinearMatMul (q, s, z, w, s, y, s, z) logits = DequantizeLinear (m, s, z)"
)
GELU = "m = MatMul (f, w) logits = com.microsoft.Gelu (m)"


@pytest.mark.parametrize(
    ("body", "kind", "parameters", "uncounted"),
    [
        ("logits = MatMul (f, w)", np.float32, 0, ""),
        ("d = DequantizeLinear (w, s, y) logits = MatMul (f, d)", np.int8, 0, ""),
        ("d = Cast <to = 1> (w) logits = MatMul (f, d)", np.int64, 0, ""),
        (INTEGERS, np.int8, 0, ""),
        (LINEAR_INTEGERS, np.int8, 0, ""),
        ("logits = com.microsoft.FusedMatMul (f, w)", np.float32, 0, ""),
        (GELU, np.float32, 0, "; not counted: Gelu"),
        (FLOATS, np.float32, 6, ""),
        (BRANCHES, np.float32, 6, "; not counted: If"),
    ],
)
def test_products_and_numbers_of_onnx_count_whatever_their_kind(
    tmp_path: Path, body: str, kind: type, parameters: int, uncounted: str
):
    """Images N x 3 x 16 x 16 times weights 768 x 5, in ONNX's own text."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]>'
        "main (float[N, 3, 16, 16] images) => (float[N, 5] logits)"
        "<float s = {0.1}, uint8 z = {3}, int8 y = {0}> { f = Flatten (images)\n" + body + "}"
    )
    weights = np.random.default_rng(0).integers(-5, 5, (768, 5)).astype(kind)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, tmp_path / "a.onnx")
    found = check(tmp_path / "a.onnx")
    assert found["parameters"].found == str(768 * 5 + 3 + parameters)  # with s, z and y
    assert found["operations"].found == f"{768 * 5 / 1e9:.3g} G in the graph{uncounted}"
    assert found["input"].status == "pass" and "opset 20" in found["input"].found


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sub/model.py", "sub/model.py, a folder too deep zip from inside"),
        ("network.py", "network.py add a model.py"),
        ("a/./model.py", "a/model.py, a folder too deep zip from inside"),
        ("../model.py", "'../model.py', which leaves it zip from inside"),
    ],
)
def test_layout(tmp_path: Path, name: str, parts: str):
    found = check(make(tmp_path / "a.zip", **{name: SOUND}))
    assert list(found) == ["archive"] and found["archive"].status == "fail"
    assert parts in words(found["archive"])


@pytest.mark.parametrize(("name", "found"), [("none.zip", "nothing there"), ("a.tar", ".tar")])
def test_what_is_no_submission(tmp_path: Path, name: str, found: str):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: expected .*, found {found}\."):
        try_submission(tmp_path / name, RULES)


def test_podman_is_a_container_only_without_a_network(monkeypatch: pytest.MonkeyPatch):
    """Its own file is not there where all is read-only, as `check.py --container` runs it."""
    monkeypatch.setenv("container", "podman")
    monkeypatch.setattr(sandbox, "_devices", lambda: ["lo"])
    assert sandbox.walls() == "container"
    monkeypatch.setattr(sandbox, "_devices", lambda: ["eth0", "lo"])
    assert sandbox.walls() != "container"


def test_a_path_that_cannot_be_mounted_is_named(tmp_path: Path):
    (tmp_path / "a,b").mkdir()
    with pytest.raises(ValueError, match="a,b: expected a path without a comma"):
        run_contained("submission/check.py", {"/in": tmp_path / "a,b"}, ())
