"""Run scripts, each in a fork of one Python that has imported what they need of other projects.

    python tests/warm_python.py

Takes a JSON list a line, [[script, argument, ...], folder, environment, file for stdout, file for
stderr], and answers with the exit status, less than 0 where a signal ended the script. Two starts
of Python would differ in the order of sets; two forks do not.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

SECONDS = 300
IMPORTED = (
    *("accelerate", "timm", "timm.optim", "timm.scheduler", "torch.distributed.run"),
    *("torch.utils.tensorboard", "torchvision", "sklearn.datasets"),
    *("sklearn.model_selection", "scipy.stats", "pandas", "matplotlib.figure", "jsonargparse"),
    *("docstring_parser", "pydantic", "rich.console", "rich.table", "jinja2"),
)
"""Of these none starts a thread, which would not be in a fork (onnxruntime does)."""


def run_script(words: list[str], folder: str, environment: dict[str, str], *outputs: str) -> None:
    """Be the script, as a Python of its own would be, for no longer than `SECONDS`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((os.devnull, *outputs)):
        os.dup2(os.open(path, os.O_RDWR), number)
    np.random.seed()  # noqa: NPY002 (what draws by it unseeded would draw alike in all forks)
    signal.alarm(SECONDS)
    sys.argv[:] = words
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def be_a_process(*request: Any) -> NoReturn:
    """Run the script and end as Python would, but for taking apart what was imported: seconds.

    What the script raises, other than SystemExit, takes Python's own way.
    """
    status = 0
    try:
        run_script(*request)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        status = end.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for name in IMPORTED:
    importlib.import_module(name)
for line in sys.stdin:
    if not (process := os.fork()):
        be_a_process(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
