"""Load the model of an unpacked package and try it: runs by itself, inside `run_isolated`.

The folder's code is a stranger's: whatever it raises becomes a line of the result, and the checks
that still can be made are made.
"""

import importlib
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from probing import (
    BATCH,
    REQUEST,
    attempt,
    describe_outputs,
    difference,
    limit_memory,
    probe_images,
    reactions,
    stability,
    write_result,
)

sys.path.remove(str(Path(__file__).parent))  # nothing of ours is there for the model

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

del sys.modules["probing"]

CONTACTS = list[str]()  # what the model tried to reach


class ContractError(Exception):
    """The package is not what it should be."""


def forbid_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: no name is looked up and no connection made."""
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        CONTACTS.append(str(arguments[1] if event == "socket.connect" else arguments[0]))
        raise OSError(f"no network: {CONTACTS[-1]}")


def load_model() -> nn.Module:
    """As the organisers load it: the folder on sys.path, `Model().float()`, mode untouched."""
    if "program" in REQUEST:
        return torch.export.load(REQUEST["program"]).module()
    sys.path.insert(0, REQUEST["folder"])
    module = importlib.import_module("model")
    if not isinstance(getattr(module, "Model", None), type):
        raise ContractError("no class Model")
    model = module.Model()
    if not isinstance(model, nn.Module):
        raise ContractError("a class Model that is no torch.nn.Module")
    return model.float()


class Runner:
    """Images to outputs, in batches, without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = [self.model(batch) for batch in torch.from_numpy(images).split(BATCH)]
        if not isinstance(parts[0], torch.Tensor):
            raise ContractError(f"{type(parts[0]).__name__} as output, no tensor")
        return torch.cat(parts).numpy(force=True)


def sizes(model: nn.Module) -> dict[str, int]:
    """How many numbers there are to train."""
    parameters = list(model.parameters())
    return {
        "total": sum(each.numel() for each in parameters),
        "trainable": sum(each.numel() for each in parameters if each.requires_grad),
    }


def modes(model: nn.Module, images: np.ndarray) -> float:
    """How far outputs differ between eval and train mode."""
    training, run = model.training, Runner(model)
    model.eval()
    calm = run(images)
    model.train()
    moved = difference(calm, run(images))
    model.train(training)
    return moved


def distributed(model: nn.Module, images: np.ndarray) -> bool:
    """Forward through DistributedDataParallel and DataParallel."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            Runner(nn.parallel.DistributedDataParallel(model))(images)
            Runner(nn.DataParallel(model))(images)
        finally:
            torch.distributed.destroy_process_group()
    return True


class Counter(TorchDispatchMode):
    """Counts what torch really runs: also functional calls and a backward inside the model."""

    total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=out) / 2
        return out


def dispatched(model: nn.Module, images: np.ndarray) -> float:
    """Multiply-adds of every matrix product and convolution that torch runs."""
    with Counter() as counter:
        Runner(model)(images)
    return counter.total


def count_by_ptflops(model: nn.Module) -> float:
    """Multiply-adds as the organisers count them."""
    sys.path.append(REQUEST["tools"])
    from ptflops import get_model_complexity_info

    side = REQUEST["image_size"]
    with torch.no_grad(), Path(os.devnull).open("w") as nowhere:
        macs, _ = get_model_complexity_info(
            model, (3, side, side), as_strings=False, print_per_layer_stat=False, ost=nowhere
        )
    assert isinstance(macs, (int, float))
    return float(macs)


def examine() -> dict[str, Any]:
    """Every probe in turn."""
    results = dict[str, Any]()
    model = attempt(results, "load", load_model)
    if not isinstance(model, nn.Module):
        return results
    results["load"] = True
    run, images = Runner(model), probe_images()
    if REQUEST.get("logits"):
        attempt(results, "logits", lambda: run(images).tolist())
    attempt(results, "parameters", lambda: sizes(model))
    found = attempt(results, "outputs", lambda: describe_outputs(run, images))
    if len(found.get("shape", ())) != 2:
        return results
    attempt(results, "stability", lambda: stability(run, images[:4]))
    if "program" not in REQUEST:
        attempt(results, "modes", lambda: modes(model, images[:4]))
        attempt(results, "distributed", lambda: distributed(model, images[:2]))
    attempt(results, "dispatched", lambda: dispatched(model, images[:1]))
    if REQUEST.get("labelled"):
        attempt(results, "reactions", lambda: reactions(run, images))
    attempt(results, "ptflops", lambda: count_by_ptflops(model))
    return results


def main() -> None:
    """Try the model and write what was found."""
    limit_memory()
    torch.set_num_threads(REQUEST["threads"])
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # they would only fill a log that nobody reads
    sys.addaudithook(forbid_network)
    write_result({**examine(), "contacts": CONTACTS})
    os._exit(0)  # threads that the model left behind do not keep the process


if __name__ == "__main__":
    main()
