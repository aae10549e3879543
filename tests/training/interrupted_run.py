"""train.py that sends itself a signal or fails, for tests: many runs behind one start of Python.

    python interrupted_run.py RUNS    # each in a process of its own, one after the other
    torchrun interrupted_run.py RUN   # in this process; where accelerate launches FSDP, sharded

RUN is JSON: {"arguments": [...], "at": "step", "count": 3, "signal": 15}, of which all but the
arguments may be left out: the signal comes before the third step, or what else TARGETS has. With
"nan": 5 the fifth loss is NaN, and with "images": 8 more than eight at once do not fit in memory.
Prints the exit status of each run, or less than 0 its signal.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from robust_submission.cli.command import run
from robust_submission.training import loop
from robust_submission.training.build import build_training
from robust_submission.training.objectives import CrossEntropy, MixedCrossEntropy
from robust_submission.training.recipe import Recipe
from robust_submission.training.run_folder import RunFolder
from robust_submission.training.state import Training

QUICKSTART = Path(__file__).parents[2] / "training" / "recipes" / "quickstart.yaml"
TARGETS = {
    "step": (loop, "train_step"),
    "validation": (Training, "validate"),
    "measure": (Training, "_measure"),
    "save": (RunFolder, "_complete"),
    "best": (RunFolder, "write_best"),
}


def interrupt(at: str, count: int, number: int) -> None:
    """Send this process a signal at the `count`-th call of what `at` names, before its work."""
    owner, name = TARGETS[at]
    original, calls = getattr(owner, name), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(owner, name, interrupted)


def spoil(nan: int | None, images: int | None) -> None:
    """Make the loss of the `nan`-th call NaN, and one of more than so many images fail."""
    calls = 0

    def spoil_loss(kind: type[CrossEntropy] | type[MixedCrossEntropy]) -> None:
        original = kind.loss

        def spoiled(objective: Any, model: nn.Module, examples: tuple[Tensor, ...]) -> Tensor:
            nonlocal calls
            calls += 1
            if images is not None and len(examples[0]) > images:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            loss = original(objective, model, examples)
            return loss * torch.nan if calls == nan else loss

        kind.loss = spoiled

    spoil_loss(CrossEntropy)
    spoil_loss(MixedCrossEntropy)


def shard_on_cpu() -> None:
    """Let accelerate shard (FSDP) what CPU processes train too, where it would only distribute."""
    original = AcceleratorState.__init__

    def sharding(state: AcceleratorState, *arguments: Any, **options: Any) -> None:
        original(state, *arguments, **options)
        if plugin := options.get("fsdp_plugin"):
            state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharding


def train(recipe: Recipe) -> None:
    loop.run_training(recipe, build_training, loop.summarize)


def start(description: dict[str, Any]) -> None:
    sys.argv = ["train.py", *description["arguments"]]
    if "signal" in description and os.environ.get("RANK", "1") == "1":
        interrupt(description["at"], description["count"], description["signal"])
    spoil(description.get("nan"), description.get("images"))
    shard_on_cpu()
    run(train, Recipe, default_config=QUICKSTART)


def start_apart(description: dict[str, Any]) -> int:
    """Run in a child process; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            start(description)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if isinstance(given, dict):
        start(given)
    print(json.dumps([start_apart(description) for description in given]))
