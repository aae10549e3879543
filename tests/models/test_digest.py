"""What names a model: everything that decides its outputs, and nothing of how it is run."""

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.cpu import optimize_for_cpu
from robust_submission.models.digest import function_digest, module_digest, source_digest
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.models.user_function import call_function
from tests.conftest import run_command


class Settings:
    """Any object; it points to itself."""

    def __init__(self, scale: float) -> None:
        self.scale, self.myself = scale, self


class Net(nn.Module):
    """A model that keeps what it computes with wherever Python lets it."""

    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(48, 3), kept
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.zeros_(self.layer.bias)


def buffer(value: float) -> Net:
    model = Net()
    model.layer.register_buffer("scale", torch.tensor(value), persistent=False)
    return model


def attribute(value: Any) -> Net:
    model = Net()
    model.layer.anything = value
    return model


def hooked(value: float) -> Net:
    model = Net()
    model.register_forward_hook(lambda *all_of_it: all_of_it[-1] * value)
    return model


def closure(value: float) -> Callable[[Any], Any]:
    return lambda images: images * value


def method(value: float) -> Net:
    """Of a class of its own, as two versions of a user's file have it."""
    members = {"forward": closure(value), "__module__": __name__}
    return type("Other", (Net,), members)()


@pytest.mark.parametrize(
    "make",
    [
        lambda value: Net(scale=value),
        lambda value: attribute(value),
        lambda value: attribute((1, [2, {"a": value}])),
        lambda value: attribute({"x", f"y{value}"}),
        lambda value: attribute(np.array([1, value])),
        lambda value: attribute(np.array(["a", value], dtype=object)),
        lambda value: attribute(torch.tensor([1, value])),
        lambda value: attribute(closure(value)),
        lambda value: attribute(partial(F.leaky_relu, negative_slope=value)),
        lambda value: attribute(Settings(value)),
        lambda value: attribute(Settings(value).__eq__),
        lambda value: attribute(torch.sin if value == 1 else torch.cos),
        lambda value: attribute(F.gelu if value == 1 else F.silu),
        lambda value: attribute(eval(f"lambda images: images * {value}")),
        lambda value: buffer(value),
        lambda value: hooked(value),
        lambda value: method(value),
        lambda value: nn.Sequential(nn.Linear(2, 2), nn.ReLU() if value == 1 else nn.GELU()),
        lambda value: nn.LayerNorm(3, eps=value),
    ],
)
def test_other_outputs_other_digest(make: Callable[[float], nn.Module]):
    torch.manual_seed(0)
    one, other = make(1), make(2)
    if isinstance(one, nn.Sequential):
        other[0].load_state_dict(one[0].state_dict())  # type: ignore[index]
    torch.manual_seed(0)
    assert module_digest(one) == module_digest(make(1)) == module_digest(copy.deepcopy(one))
    assert module_digest(one) != module_digest(other)


def test_how_a_model_is_run_does_not_count():
    torch.manual_seed(0)
    model = RobustClassifier(
        class_names=["a", "b"],
        image_size=32,
        backbone="test_convnext",
        randomize={"min_size": 24},
    )
    before = module_digest(model)
    optimize_for_cpu(model, channels_last=True, one_size=False)
    assert isinstance(model.randomize, RandomResizePad)
    model.eval().requires_grad_(False)
    model.randomize.draw = 3
    model(torch.zeros(2, 3, 32, 32))
    assert module_digest(model) == before
    model.randomize.seed = 1
    assert module_digest(model) != before


CODE = """
import sys, torch
from torch import nn
from robust_submission.models.digest import module_digest
KNOWN = {"pear", "apple", "plum", "fig", "quince"}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.names, self.act, self.other = set(KNOWN), lambda x: x in KNOWN, object()
        self.register_forward_pre_hook(self.act)
    def forward(self, x):
        return x if x in {"a", "b", "c"} else self.act(x)
for _ in range(int(sys.argv[1])): Net().act(1.0)
print(module_digest(Net()))
"""


def test_neither_the_order_of_a_set_nor_list_or_tuple_counts():
    assert list({0, 8}) != list({8, 0})
    assert module_digest(attribute({0, 8})) == module_digest(attribute({8, 0}))
    assert module_digest(attribute([0, 8])) == module_digest(attribute((0, 8)))
    assert module_digest(attribute([0, 8])) != module_digest(attribute([8, 0]))


def test_another_process_gives_the_same(tmp_path: Path):
    (tmp_path / "script.py").write_text(CODE)
    one, other = (run_command(tmp_path / "script.py", number) for number in (1, 50))
    assert one.stdout == other.stdout and len(one.stdout) == 33, one.stderr


@pytest.mark.parametrize("named", ["net.py:model", "net:model", "room.net:model"])
def test_what_a_users_module_imports_is_known_by_its_source(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    folder = tmp_path / "room" if "room" in named else tmp_path
    (folder / "parts").mkdir(parents=True)
    (folder / "net.py").write_text("from parts.layers import SCALE\ndef model(): return abs\n")
    if "room" in named:
        (folder / "net.py").write_text("from .parts.layers import SCALE\ndef model(): return abs\n")
    (folder / "unused.py").write_text("1")
    digests = list[str]()
    for changed, text in (("parts/layers.py", "SCALE = 1"), ("unused.py", "2")):
        (folder / changed).write_text(text)
        call_function(named)
        digests.append(source_digest(named.partition(":")[0]))
    (folder / "parts/layers.py").write_text("SCALE = 2")
    changed = source_digest(named.partition(":")[0])
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("net", "parts", "room"):
            del sys.modules[name]
    assert digests[0] == digests[1] != changed != ""
    assert source_digest("torch") == source_digest("robust_submission") == source_digest("") == ""


SCALE = 1.0


def test_a_function_is_known_by_what_it_captures_and_reads(monkeypatch: pytest.MonkeyPatch):
    def read(images: Tensor) -> Tensor:
        return closure(2)(images) * SCALE

    before = function_digest(read)
    assert before == function_digest(read) != function_digest(lambda images: read(images))
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    assert function_digest(read) != before
    layer = nn.Linear(2, 2)
    around = function_digest(lambda images: layer(images))
    with torch.no_grad():
        layer.bias[0] += 1
    assert function_digest(lambda images: layer(images)) != around
