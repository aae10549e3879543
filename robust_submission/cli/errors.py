"""Messages to the user: errors that end a command without a traceback, and the project's logger.

What a command is run for goes to stdout by `print`; notes and warnings go through `log`. A program
that imports the package configures the logger "robust_submission" as any other.
"""

import logging
import os
from functools import cache

log = logging.getLogger("robust_submission")


@cache
def log_once(message: str) -> None:
    """Warn the user once, however often the same is found, and in the main process alone."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(message)


class UserError(ValueError):
    """Something that the user can mend, worded "FILE: expected X, found Y." Exit status 1.

    Raised where a user's file, option or argument is read. Any other exception is a bug of ours
    and shows its traceback.
    """


class UsageError(Exception):
    """The command line itself is wrong. Exit status 2."""


class StoppedError(Exception):
    """A signal stopped the work, in good order and with a message. Exit status 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number
