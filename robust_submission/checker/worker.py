"""Load the model of an unpacked package and probe it, in the bounded process.

The folder's code may be anyone's: whatever it raises becomes a line of the result, and the probes
that are still possible are made.
"""

import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robust_submission.checker.probes import (
    BATCH,
    BatchRunner,
    Probes,
    Stage,
    output_difference,
    run_worker,
)

AuditHook = Callable[[str, tuple[object, ...]], None]


class ContractError(Exception):
    """The package does not define what the challenge asks for."""


def refuse_network(contacts: list[str]) -> AuditHook:
    """An audit hook that lets no name be looked up and no connection be made."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            contacts.append(str(arguments[1] if event == "socket.connect" else arguments[0]))
            raise OSError(f"no network: {contacts[-1]}")

    return hook


def load_packaged_model(folder: str) -> nn.Module:
    """As the organisers load it: the folder on sys.path, `Model().float()`, mode untouched."""
    sys.path.insert(0, folder)
    module = importlib.import_module("model")
    if not isinstance(getattr(module, "Model", None), type):
        raise ContractError("no class Model")
    model = module.Model()
    if not isinstance(model, nn.Module):
        raise ContractError("a class Model that is not a torch.nn.Module")
    return model.float()


def torch_runner(model: nn.Module) -> BatchRunner:
    """The model as a function of arrays, in batches, without gradients."""

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = [model(batch) for batch in torch.from_numpy(images).split(BATCH)]
        if not isinstance(parts[0], torch.Tensor):
            raise ContractError(f"{type(parts[0]).__name__} as output, not a tensor")
        return torch.cat(parts).numpy(force=True)

    return run


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that require a gradient."""
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return sum(each.numel() for each in model.parameters()), trainable


def compare_modes(model: nn.Module, images: np.ndarray) -> float:
    """How much outputs differ between eval and train mode; leaves the model as it is."""
    modes = [(part, part.training) for part in model.modules()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]  # a batch norm's statistics
    run = torch_runner(model)
    try:
        model.eval()
        evaluated = run(images)
        model.train()
        return output_difference(evaluated, run(images))
    finally:
        for part, training in modes:
            part.training = training
        for buffer, value in kept:
            buffer.data = value


def run_distributed(model: nn.Module, images: np.ndarray) -> bool:
    """Forward through DistributedDataParallel and DataParallel."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            torch_runner(nn.parallel.DistributedDataParallel(model))(images)
            torch_runner(nn.DataParallel(model))(images)
        finally:
            torch.distributed.destroy_process_group()
    return True


class DispatchCounter(TorchDispatchMode):
    """Counts what torch runs, also functional calls and a backward pass inside the model.

    torch's FlopCounterMode follows modules too, which fails on such a backward pass.
    """

    total = 0.0
    """Multiply-adds of matrix products and convolutions."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None and func is not torch.ops.prim.device.default:
            with self:  # inference mode dispatches whole layers
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=out) / 2
        return out


def count_dispatched(model: nn.Module, images: np.ndarray) -> float:
    """Multiply-adds of one forward pass, as torch runs it."""
    with DispatchCounter() as counter:
        torch_runner(model)(images)
    return counter.total


def count_by_ptflops(model: nn.Module, image_size: int, tools: Path) -> float:
    """Multiply-adds as the organisers count them."""
    sys.path.append(str(tools))
    from ptflops import get_model_complexity_info

    shape = (3, image_size, image_size)
    with torch.no_grad(), Path(os.devnull).open("w") as nowhere:
        macs, _ = get_model_complexity_info(
            model, shape, as_strings=False, print_per_layer_stat=False, ost=nowhere
        )
    assert isinstance(macs, (int, float))
    return float(macs)


def probe_package(probes: Probes) -> None:
    """Every probe in turn."""
    request, result = probes.request, probes.result
    torch.set_num_threads(request.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # they would only fill a log that nobody reads
    sys.addaudithook(refuse_network(result.contacts))
    model = probes.attempt(Stage.LOAD, lambda: load_packaged_model(request.submission))
    if model is None:
        return
    result.loaded = True
    counted = probes.attempt(Stage.PARAMETERS, lambda: count_parameters(model))
    result.parameters, result.trainable = counted or (None, None)
    if not probes.probe_outputs(torch_runner(model)):
        return
    images = probes.images
    result.modes = probes.attempt(Stage.MODES, lambda: compare_modes(model, images[:4]))
    result.distributed = probes.attempt(
        Stage.DISTRIBUTED, lambda: run_distributed(model, images[:2])
    )
    probes.count("dispatched", lambda: count_dispatched(model, images[:1]))
    tools = probes.folder / "tools"
    probes.count("ptflops", lambda: count_by_ptflops(model, request.image_size, tools))


if __name__ == "__main__":
    run_worker(probe_package)
