"""Run scripts, each in a fork of one Python that has imported what they need of other projects.

    python tests/warm_python.py

Takes a JSON list a line, [[script, argument, ...], folder, environment, file for stdout, file for
stderr], and answers with the number of a process; or that number, and answers with the exit status
once the process has ended, less than 0 where a signal ended it. Processes that the script starts by
torchrun are forks too. Two starts of Python would differ in the order of sets; two forks do not.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

SECONDS = 300
IMPORTED = (
    *("accelerate", "timm", "timm.optim", "timm.scheduler", "torch.distributed.run"),
    *("torch.utils.tensorboard", "torchvision", "sklearn.datasets"),
    *("sklearn.model_selection", "scipy.stats", "pandas", "matplotlib.figure", "jsonargparse"),
    *("docstring_parser", "pydantic", "rich.console", "rich.table", "jinja2"),
)
"""Of these none starts a thread, which would not be in a fork (onnxruntime does)."""


def run_script(words: list[str], environment: dict[str, str]) -> None:
    """Be the script, as a Python of its own would be, for no longer than `SECONDS`."""
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # noqa: NPY002 (what draws by it unseeded would draw alike in all forks)
    signal.alarm(SECONDS)
    sys.argv[:] = words
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def be_a_process(words: list[str], environment: dict[str, str]) -> NoReturn:
    """Run the script and end as Python would, but for taking apart what was imported: seconds."""
    status = 0
    try:
        run_script(words, environment)
    except BaseException as error:  # a fork of torchrun must not go on as torchrun
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            status = error.code or 0
        else:
            sys.excepthook(*sys.exc_info())
            status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Forked(subprocess.Popen[bytes]):
    """A process that torchrun starts: a fork of it, not a Python that imports everything anew."""

    def _execute_child(self, *arguments: Any) -> None:
        (_python, _unbuffered, *words), environment = arguments[0], arguments[6]
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun's handlers
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            be_a_process(words, environment)
        self._child_created = True


for name in IMPORTED:
    importlib.import_module(name)
subprocess_handler.Popen = Forked
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
    elif not (answer := os.fork()):
        words, folder, environment, *outputs = request
        os.chdir(folder)
        for number, path in enumerate((os.devnull, *outputs)):
            os.dup2(os.open(path, os.O_RDWR), number)
        be_a_process(words, environment)
    print(answer, flush=True)
