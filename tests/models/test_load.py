"""The models that `--model` names: a user's own, found as the user would find them."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from robust_submission.models import load
from robust_submission.models.load import load_named
from tests.conftest import run_command

NETWORK = """
from torch import nn
NUMBER = 3
def good():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model.image_size = 8
    return model
def sizeless():
    return lambda images: images
def number():
    return 3
def needy(size):
    return good()
def leaves():
    raise SystemExit("usage: train [--size N]\\nand more")
def inside_torch():
    return nn.Sequential(nn.Linear("wide", 3))
"""
OURS = ("models", "data", "training", "cli", "attacks", "inference", "submission", "utils")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of the user's, which is the current directory; what is imported is forgotten."""
    (tmp_path / "network.py").write_text(NETWORK)
    (tmp_path / "broken.py").write_text("def model(:")
    (tmp_path / "stops.py").write_text("import sys\n\nsys.exit(2)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        monkeypatch.delitem(sys.modules, name)  # other tests import the commands by these names
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("place", ["network", "network.py"])
def test_a_function_is_called_for_its_model(place: str):
    loaded = load_named(None, f"{place}:good")
    assert loaded.image_size == 8 and isinstance(loaded.model, nn.Sequential)
    assert load_named(None, f"{place}:sizeless", 16).image_size == 16


@pytest.mark.parametrize("package", OURS)
@pytest.mark.parametrize("as_file", [False, True])
def test_packages_of_the_users_are_found(
    package: str, as_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the current directory, or beside the file; whatever else of that name is installed."""
    (tmp_path / "installed" / package).mkdir(parents=True)
    (tmp_path / "installed" / package / "__init__.py").touch()
    sys.path.insert(0, str(tmp_path / "installed"))
    home = tmp_path / "project"
    (home / package).mkdir(parents=True)
    (home / package / "__init__.py").write_text("from network import good")
    (home / package / "net.py").write_text(f"from {package} import good")
    (home / "network.py").write_text(NETWORK)
    (home / "main.py").write_text(f"from {package}.net import good")
    if not as_file:
        monkeypatch.chdir(home)
    name = "project/main.py:good" if as_file else f"{package}.net:good"
    assert load_named(None, name).image_size == 8
    assert sys.path[0] == str(tmp_path / "installed") and str(home) in sys.path


def test_the_command_finds_them_too(tmp_path: Path):
    for package in OURS:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "models" / "net.py").write_text("from utils import absent")
    options = ("--out", "report", "--data.name", "digits", "--model", "models.net:good")
    done = run_command("inference/evaluate.py", *options, cwd=tmp_path)
    message = "models.net:good: expected a module to import, found ImportError: cannot import name"
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert str(Path("models", "net.py")) + ", line 1" in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("network:sizeless", "expected --image_size"),
        ("network:god", "expected a function 'god' in network, .* nearest: good"),
        ("network:NUMBER", "expected a function 'NUMBER' .* found int"),
        ("network:number", "expected a callable from images to logits, found int"),
        ("network:needy", "needs no arguments, found TypeError: needy.. missing 1 required"),
        ("network:leaves", r"found SystemExit: usage: train .--size N. \(network.py, line 15\)\.$"),
        ("network.py:inside_torch", r"found TypeError: .* \(network.py, line 17\)\.$"),
        ("stops:model", r"found SystemExit: 2 \(stops.py, line 3\)\.$"),
        ("absent:model", "found ModuleNotFoundError: No module named 'absent'.$"),
        ("absent.py:model", "expected the Python file absent.py, found none"),
        ("broken:model", r"found SyntaxError: .*\(broken.py, line 1\)\.$"),
        ("..broken:model", "found TypeError"),
        ("resnet19", "nearest timm model: resnet1"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_named(None, name)


def test_what_cannot_be_downloaded_is_named(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(load, "hf_hub_download", offline)
    monkeypatch.setattr("timm.create_model", offline)
    for name in ("resnet18", "ada/digits"):
        with pytest.raises(ValueError, match=f"^{name}: expected a model .*, found no network$"):
            load_named(None, name)


def test_a_published_model_normalises_as_it_was_trained(monkeypatch: pytest.MonkeyPatch):
    network = nn.Identity()
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 160, 160)}
    monkeypatch.setattr("timm.create_model", lambda *_, **__: network)
    loaded = load_named(None, "resnet18")
    assert loaded.image_size == 160
    assert torch.equal(loaded.model(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 2.0))


def test_checkpoint_or_model():
    for both in ((None, None), (Path("runs"), "resnet18")):
        with pytest.raises(ValueError, match="either --checkpoint or --model"):
            load_named(*both)
    with pytest.raises(ValueError, match="expected the folder of a checkpoint"):
        load_named(Path("runs"), None)
