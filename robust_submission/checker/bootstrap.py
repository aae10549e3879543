"""The first code in the bounded process: import a worker, set the memory limit, run the worker.

    python -I -S -B bootstrap.py FOLDER MODULE BYTES

FOLDER/packages holds all that the worker may import besides the standard library, FOLDER/code the
code of this package. Once the worker is imported, nothing of this package can be imported any more:
a submission that imports it, or that has modules of the same names, behaves as it would elsewhere.
"""

import importlib
import os
import resource
import sys
from pathlib import Path
from types import ModuleType


def import_hidden(path: Path, name: str) -> ModuleType:
    """Import a module from `path`, then remove its package from what can be imported."""
    sys.path.insert(0, str(path))
    module = importlib.import_module(name)
    sys.path.remove(str(path))
    top = name.partition(".")[0]
    for each in [each for each in sys.modules if each.partition(".")[0] == top]:
        del sys.modules[each]
    return module


def limit_memory(room: int) -> None:
    """Let this process grow by `room` bytes and write no file above 1 GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Run the worker."""
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(folder / "packages"))
    worker = import_hidden(folder / "code", sys.argv[2])
    limit_memory(int(sys.argv[3]))  # what the packages took is not counted
    worker.main(folder)
    os._exit(0)  # threads that the model left behind must not keep the process alive


if __name__ == "__main__":
    main()
