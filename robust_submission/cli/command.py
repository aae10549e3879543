"""Runs a command: parses its options into a dataclass and turns errors into an exit status.

Exit status: 0 done; 1 the work failed or the input is bad; 2 wrong usage; 130 and 143 stopped by
SIGINT (Ctrl-C) and SIGTERM. Only a UserError is printed as a message; any other exception is a bug
and shows its traceback. Set ROBUST_TRACEBACK=1 to see the traceback of a UserError too.

A command's file imports at its top what its options need, and everything else in `main`: torch and
timm take seconds, which --help and a mistyped option need not.
"""

import argparse
import codecs
import difflib
import inspect
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar
from unicodedata import normalize

import jsonargparse
from docstring_parser import parse_from_object
from jsonargparse import (  # pyright: ignore[reportPrivateImportUsage]
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
)
from jsonargparse.typing import register_type
from tqdm import tqdm

from robust_submission.cli.documents import read_yaml
from robust_submission.cli.errors import (
    StoppedError,
    UsageError,
    UserError,
    log,
    printable,
    shorten,
)
from robust_submission.cli.values import Names, Ratio, Ratios, check_values

Options = TypeVar("Options")

_SWITCHES = ("true", "false", "yes", "no", "on", "off")
PATIENCE = 5.0
"""Seconds after SIGTERM until a process ends that is still at work or waits."""
_TERMINATED = 128 + signal.SIGTERM
_LOST = re.compile("Connection (closed|reset) by peer|Timed out waiting|ncclRemoteError")
_UNKNOWN = {
    r"unrecognized arguments: --([\w.]+)": "option --",
    r"Group '([\w.]+)' does not accept option '([\w.]+)'": "key ",
    r"Option '([\w.]+)' is not accepted": "key ",
}
"""jsonargparse's messages about an unknown option of the command line or key of a file."""

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


register_type(Ratio, serializer=float, deserializer=Ratio)
register_type(Names, serializer=list, deserializer=Names)
register_type(Ratios, serializer=list, deserializer=Ratios)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description."""


def _explain(message: str, known: Sequence[str]) -> str:
    """jsonargparse's message in one line; an unknown key is named with the nearest known one."""
    message = " ".join(message.split())
    for pattern, kind in _UNKNOWN.items():
        if unknown := re.search(pattern, message):
            name = ".".join(unknown.groups())
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            nearest = f"; nearest known: {close[0]}" if close else ""
            return f"unknown {kind}{name}{nearest}."
    return message


def _spell_out_flags(arguments: Sequence[str], flags: set[str]) -> list[str]:
    """`--skip_bad` alone means `--skip_bad true`, whose value may be any that YAML has."""
    spelled = list[str]()
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        spelled.append(argument)
        if argument in flags and following.lower() not in _SWITCHES:
            spelled.append("true")
    return spelled


def parse(
    options: type[Options],
    arguments: Sequence[str],
    default_config: Path | None = None,
    description: str | None = None,
) -> Options:
    """Build the dataclass `options` from command-line arguments.

    Args:
        options: A keyword-only dataclass. The docstring under each field is its help; a field with
            metadata {"positional": True} is a positional argument.
        arguments: The command line without the program's name.
        default_config: For commands with `--config`: the YAML file to read when none is given.
        description: The first lines of `--help`.

    Raises:
        UsageError: An option is unknown, missing, or has a value of the wrong type.
        UserError: A configuration file cannot be read or has an unknown key, or the dataclass
            refuses a value.
    """
    parser = _build_parser(options, description, takes_config=default_config is not None)
    actions = [each for each in parser._actions if each.dest not in ("help", "print_config")]
    flags = {f"--{each.dest}" for each in actions if getattr(each, "_typehint", None) is bool}
    known = [each.dest for each in actions if each.option_strings]
    configs = list[str]()
    if default_config:
        configs, arguments = _split_configs(arguments, default_config)
        for config in configs:
            _check_config(parser, options, config, known)
    files = [f"--config={config}" for config in configs]
    try:
        return _build(parser, options, [*files, *_spell_out_flags(arguments, flags)])
    except ArgumentError as error:
        raise UsageError(_explain(str(error), known)) from error
    except UserError as error:
        for config in configs:
            if str(error) == _fault_of(parser, options, config):
                raise UserError(f"{config}: {error}") from error
        raise


def _build(parser: ArgumentParser, options: type[Options], arguments: Sequence[str]) -> Options:
    """The dataclass of these arguments.

    Raises:
        ArgumentError: jsonargparse refuses them.
        UserError: the dataclass does.
    """
    namespace = parser.parse_args(list(arguments))
    check_values(options, namespace.as_dict())
    values = dict(vars(parser.instantiate(namespace)))
    values.pop("config", None)
    return options(**values)


def _fault_of(parser: ArgumentParser, options: type[Options], config: str) -> str:
    """What the dataclass refuses of a configuration file alone."""
    try:
        _build(parser, options, [f"--config={config}"])
    except UserError as error:
        return str(error)
    except ArgumentError:
        pass
    return ""


def _build_parser(options: type, description: str | None, takes_config: bool) -> ArgumentParser:
    """A parser with one option per field, or positional argument where its metadata says so."""
    assert is_dataclass(options)
    parser = ArgumentParser(
        description=(description or "").strip(),
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    if takes_config:
        parser.add_argument("--config", action=ActionConfigFile, help="A recipe (YAML).")
    helps = {text.arg_name: text.description for text in parse_from_object(options).params}
    positional = [field for field in fields(options) if field.metadata.get("positional")]
    for field in positional:
        parser.add_argument(field.name, type=field.type, help=helps.get(field.name))
    parser.add_class_arguments(options, as_group=False, skip={field.name for field in positional})
    return parser


def _split_configs(arguments: Sequence[str], default: Path) -> tuple[list[str], list[str]]:
    """The files of `--config`, which the others override wherever they stand; and the others."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append")
    found, others = finder.parse_known_args(list(arguments))
    return found.config or [str(default)], others


def _check_config(parser: ArgumentParser, options: type, config: str, known: Sequence[str]) -> None:
    """Check a file of `--config` alone, so that its faults are reported as the file's.

    Raises:
        UserError: it cannot be read, or has an unknown key or a value of the wrong type.
    """
    values = read_yaml(Path(config), "a recipe")
    if not isinstance(values, Mapping):
        raise UserError(f"{config}: expected keys and their values, found {shorten(values)}.")
    try:
        check_values(options, values)
        parser.parse_args([f"--config={config}"])
    except UserError as error:
        raise UserError(f"{config}: {error}") from error
    except ArgumentError as error:
        if "required" not in str(error):  # the command line may have it
            raise UserError(f"{config}: {_explain(str(error), known)}") from error


class _BesideProgressBars(logging.Handler):
    """Prints a record above the progress bars instead of into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def _send_log_to_stderr() -> None:
    """Print records of level INFO and above; for commands, once per process."""
    if not log.handlers:
        log.addHandler(_BesideProgressBars())
        log.setLevel(logging.INFO)
        log.propagate = False


def _lost_another(error: RuntimeError) -> bool:
    """Whether gloo or NCCL says that another process of this run has ended."""
    return "LOCAL_RANK" in os.environ and bool(_LOST.search(str(error)))


def _stop(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # one is enough
    last = threading.Timer(PATIENCE, os._exit, [_TERMINATED])  # a thread may wait for ever
    last.daemon = True
    last.start()
    sys.exit(_TERMINATED)


def _work(work: Callable[[Options], None], options: Options) -> None:
    """Do the work; code that it runs may be the user's, and may not end the command."""
    try:
        work(options)
    except SystemExit as end:
        if end.code == _TERMINATED:  # to take apart what was imported takes Python seconds
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_TERMINATED)
        found = f"exit({shorten(end.code)})"
        raise UserError(f"expected code that returns, found {found}.") from end


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """A no-break space as a space, … as three points, and whatever is no ASCII escaped."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    plain = [each if (each := normalize("NFKD", one)).isascii() else one for one in found]
    return "".join(plain).encode("ascii", "backslashreplace").decode(), error.end


def _print_anything() -> None:
    """Escape what the terminal's encoding lacks, instead of raising."""
    codecs.register_error("in_ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="in_ascii")


def run(
    work: Callable[[Options], None], options: type[Options], default_config: Path | None = None
) -> NoReturn:
    """Parse the command line into `options`, do the work, and exit with its status.

    SIGTERM raises SystemExit, so that every `finally` runs, for at most `PATIENCE` seconds. Not
    under a launcher: there a process might wait in a `finally` for another that has ended.
    """
    # Threads that wait for each other spin by default, in the way of whatever else needs the cores;
    # torch's OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _print_anything()
    _send_log_to_stderr()
    if "LOCAL_RANK" not in os.environ:
        signal.signal(signal.SIGTERM, _stop)
    try:
        script = inspect.getmodule(work)
        description = script.__doc__ if script else None
        _work(work, parse(options, sys.argv[1:], default_config, description))
    except UsageError as error:
        status, message = 2, f"{error}\nSee --help."
    except UserError as error:
        if os.environ.get("ROBUST_TRACEBACK"):
            raise
        status, message = 1, str(error)
    except RuntimeError as error:
        if os.environ.get("ROBUST_TRACEBACK") or not _lost_another(error):
            raise
        status, message = 1, "another process of this run ended; its own message says why."
    except StoppedError as stop:
        sys.exit(stop.status)
    except KeyboardInterrupt:
        status, message = 130, "interrupted."
    else:
        sys.exit(0)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
