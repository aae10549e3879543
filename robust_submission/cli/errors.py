"""Messages to the user: errors that end a command without a traceback, and the project's logger.

What a command is run for goes to stdout by `print`; notes and warnings go through `log`. A program
that imports the package configures the logger "robust_submission" as any other.
"""

import logging
import os
import re
from functools import cache

log = logging.getLogger("robust_submission")

FOUND = 80
"""Characters of what was found that a message shows."""
LONGEST = 500
"""Characters of a line of a message; of a longer one `FOUND` characters follow "found"."""
_CONTROL = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff]"
)
"""What a terminal acts on or cannot show, but for the line feed: also marks of text direction, and
surrogates."""


@cache
def log_once(message: str) -> None:
    """Warn the user once, however often the same is found, and in the main process alone."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(message)


def printable(text: object) -> str:
    """Text for a terminal: control characters are escaped, but for line feeds."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def shorten(value: object, length: int = FOUND) -> str:
    """A value as a message shows it: in quotes where it is text, cut when long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


class _MessageError(Exception):
    """What was found may be anything: control characters are escaped and long lines cut."""

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(_cut, printable(message).split("\n"))))


class UserError(_MessageError, ValueError):
    """Something that the user can mend, worded "FILE: expected X, found Y." Exit status 1.

    Raised where a user's file, option or argument is read. Any other exception is a bug of ours
    and shows its traceback.
    """


def _cut(line: str) -> str:
    if len(line) <= LONGEST:
        return line
    expected, word, found = line.partition("found")
    return f"{expected[: LONGEST - FOUND]}{word}{found[:FOUND]}…"


class UsageError(_MessageError):
    """The command line itself is wrong. Exit status 2."""


class StoppedError(Exception):
    """A signal stopped the work, in good order and with a message. Exit status 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.status = number, 128 + number
