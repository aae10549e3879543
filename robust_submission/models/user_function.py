"""Call the function that gives a user's own model, and find the modules that it imports.

The name is `package.module:function` or `path/to/file.py:function`. While the module is imported
and the function runs, the current directory (and before it the file's) is searched first, so that
nothing installed shadows the user's own `models/` or `utils/`.
"""

import difflib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from robust_submission.cli.errors import UserError

Given = TypeVar("Given")

_NOT_THE_USERS = (
    "<frozen",
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)
"""How the names of files begin that are Python's, installed or ours."""


def is_users_file(path: str) -> bool:
    """Whether a file is neither Python's, nor installed, nor ours."""
    installed = {"site-packages", "dist-packages"} & set(Path(path).parts)
    return not installed and not path.startswith(_NOT_THE_USERS)


def call_function(name: str) -> object:
    """What the function of that name returns, called without arguments.

    Raises:
        UserError: there is no such function, or the user's code raises anything, `SystemExit`
            included; the message then says where.
    """
    place, _, attribute = name.rpartition(":")
    folders = [Path.cwd()]
    load = partial(importlib.import_module, place)
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UserError(f"{name}: expected the Python file {place}, found none.")
        folders.insert(0, Path(place).resolve().parent)
        load = partial(_import_file, place)
    with _searched_first(folders):
        module = _run(load, f"{name}: expected a module to import")
        function = getattr(module, attribute, None)
        if not callable(function):
            nearest = difflib.get_close_matches(attribute, dir(module), n=1)
            hint = f"; nearest: {nearest[0]}" if nearest else ""
            found = "none" if function is None else type(function).__name__
            expected = f"a function {attribute!r} in {place}"
            raise UserError(f"{name}: expected {expected}, found {found}{hint}.")
        return _run(function, f"{name}: expected a function that needs no arguments")


def _import_file(path: str) -> ModuleType:
    """The module of a file, known to `sys.modules` by its path."""
    spec = importlib.util.spec_from_file_location(path, Path(path).resolve())
    assert spec and spec.loader
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _searched_first(folders: list[Path]) -> Iterator[None]:
    """Have imports look into these folders first, and afterwards last, for late imports."""
    names = list(map(str, folders))
    sys.path[:0] = names
    try:
        yield
    finally:
        for name in names:
            if name in sys.path:
                sys.path.remove(name)
        sys.path += [name for name in names if name not in sys.path]


def _run(function: Callable[[], Given], expected: str) -> Given:
    try:
        return function()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code: anything, SystemExit too
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{expected}, found {message}{_raised_at(error)}.") from error


def _raised_at(error: BaseException) -> str:
    """The last line of the user's own code in a traceback: ` (net.py, line 3)`."""
    if isinstance(error, SyntaxError):
        return ""  # its message ends so
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users_file(frame.filename):
            path = Path(frame.filename)
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            return f" ({shown}, line {frame.lineno})"
    return ""
