"""Run a script that can write no file beyond a size, as on a disk that is full.

    python tests/small_files.py BYTES SCRIPT [ARGUMENT ...]

What it prints counts too where it goes to a file.
"""

import resource
import runpy
import sys

limit, sys.argv = int(sys.argv[1]), sys.argv[2:]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_path(sys.argv[0], run_name="__main__")
