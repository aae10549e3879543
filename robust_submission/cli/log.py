"""The project's one logger: notes and warnings on stderr, beside any progress bar.

    from robust_submission.cli.log import log
    log.warning("%s: 3 images skipped.", path)

What a command is run for goes to stdout by `print`; everything else goes through this logger. A
program that imports the package configures the logger "robust_submission" as any other.
"""

import logging
import sys

from tqdm import tqdm

log = logging.getLogger("robust_submission")


class _BesideProgressBars(logging.Handler):
    """Prints a record above the progress bars instead of into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def send_log_to_stderr() -> None:
    """Print records of level INFO and above; for commands, once per process."""
    if not log.handlers:
        log.addHandler(_BesideProgressBars())
        log.setLevel(logging.INFO)
        log.propagate = False
