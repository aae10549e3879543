"""Run scripts, each in a fork of one Python that has imported torch, timm and accelerate.

    python tests/warm_python.py

Takes a JSON list a line, [[script, argument, ...], folder, environment, file for stdout, file for
stderr], and answers with the exit status, less than 0 where a signal ended the script. Two starts
of Python would differ in the order of sets; two forks do not.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import accelerate  # noqa: F401
import numpy as np
import timm  # noqa: F401

SECONDS = 300


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


for line in sys.stdin:
    if not (process := os.fork()):
        run_script(*json.loads(line))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
