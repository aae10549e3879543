"""Command lines: values, help, errors, exit status."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from robust_submission.cli.command import Names, Ratio, Ratios, parse
from robust_submission.cli.errors import UsageError, UserError


@dataclass(frozen=True, kw_only=True)
class Model:
    """A part of the options."""

    backbone: str = "convnext_tiny"
    """The network."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the tests parse."""

    out: Path
    """Where the result goes."""
    epsilon: Ratio = Ratio("8/255")
    """The largest change of a pixel."""
    attacks: Names = Names()
    """Which attacks."""
    radii: Ratios = Ratios()
    """Several sizes."""
    skip_bad: bool = False
    """Go on after an unreadable image."""
    limit: int | None = None
    """The first images only."""
    model: Model = field(default_factory=Model)
    """The classifier."""

    def __post_init__(self) -> None:
        if self.limit == 0:
            raise UserError("--limit: expected at least 1, found 0.")


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Options with a word that has no name."""

    file: Path = field(metadata={"positional": True})
    """The file to read."""
    images: Path | None = None
    """A folder."""
    skip_bad: bool = False
    """A flag."""


# --- types


def test_ratio() -> None:
    for text, value in (("8/255", 8 / 255), ("0.03", 0.03), ("0", 0), ("1e-3", 1e-3), (0.5, 0.5)):
        assert Ratio(text) == value and isinstance(Ratio(text), float)
    for text in ("eight", "1/0", "1/2/3", "", "nan", "1e309", "1e999999999", None):
        with pytest.raises(ValueError, match="a number or a fraction such as 8/255, found"):
            Ratio(text)


def test_names_and_ratios() -> None:
    assert Names("pgd, fgsm,") == ("pgd", "fgsm")
    assert Names(["a,b", "c"]) == ("a,b", "c")
    assert Names("") == ()
    assert Ratios("4/255,0.5") == (4 / 255, 0.5)
    assert Ratios(0.25) == (0.25,)
    assert Ratios([1, "1/2"]) == (1.0, 0.5)


# --- parsing


def test_defaults_and_values() -> None:
    options = parse(Options, ["--out", "a/b.csv"])
    assert options == Options(out=Path("a/b.csv"))
    words = ["--out=x", "--epsilon", "4/255", "--attacks", "pgd,fgsm", "--radii", "1/2,1"]
    options = parse(Options, [*words, "--limit", "5", "--model.backbone", "resnet18"])
    assert options == Options(
        out=Path("x"),
        epsilon=Ratio("4/255"),
        attacks=Names("pgd,fgsm"),
        radii=Ratios("1/2,1"),
        limit=5,
        model=Model(backbone="resnet18"),
    )
    assert isinstance(options.epsilon, Ratio)
    assert isinstance(options.attacks, Names) and isinstance(options.radii, Ratios)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--skip_bad", "--limit", "3"], True),
        (["--limit", "3", "--skip_bad"], True),
        (["--skip_bad", "false"], False),
        *((["--skip_bad", word], True) for word in ("yes", "on", "True")),
        *((["--skip_bad", word], False) for word in ("no", "off")),
        (["--skip_bad=true"], True),
        ([], False),
    ],
)  # fmt: skip
def test_flags(words: list[str], value: bool) -> None:
    assert parse(Options, ["--out", "x", *words]).skip_bad is value


@pytest.mark.parametrize(
    "words", [["a.csv", "--skip_bad"], ["--skip_bad", "a.csv"], ["--skip_bad", "true", "a.csv"]]
)
def test_positional(words: list[str]) -> None:
    assert parse(FileOptions, words) == FileOptions(file=Path("a.csv"), skip_bad=True)
    options = parse(FileOptions, ["--images", "d", *words])
    assert options.images == Path("d")


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        (Options, [], "out"),
        (Options, ["--out", "x", "--limt", "3"], "unknown option --limt; nearest known: limit."),
        (Options, ["--out", "x", "--zzzzzz", "3"], "unknown option --zzzzzz."),
        (Options, ["--out", "x", "--model.backbon", "a"], "nearest known: model.backbone"),
        (Options, ["--out", "x", "--limit", "many"], "many"),
        (Options, ["--out", "x", "--epsilon", "1/0"], "expected a number or a fraction"),
        (Options, ["--ou", "x"], "out"),  # no abbreviations
        (Options, ["--out", "x", "--skip_bad=maybe"], "maybe"),
        (FileOptions, [], "file"),
        (FileOptions, ["a", "--fil", "b"], "unknown option --fil."),
        (FileOptions, ["a", "b"], "b"),
    ],
)
def test_usage_errors(options: type, words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(options, words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_the_dataclass_refuses_is_a_user_error() -> None:
    with pytest.raises(UserError, match="--limit: expected at least 1"):
        parse(Options, ["--out", "x", "--limit", "0"])


# --- recipes


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("out: from_recipe\nlimit: 7\nmodel:\n  backbone: resnet50\n")
    return path


def test_default_config(recipe: Path) -> None:
    expected = Options(out=Path("from_recipe"), limit=7, model=Model(backbone="resnet50"))
    assert parse(Options, [], recipe) == expected
    assert parse(Options, ["--limit", "9"], recipe).limit == 9


def test_config_replaces_the_default(tmp_path: Path, recipe: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("out: other\n")
    for words in (["--config", str(other)], [f"--config={other}"]):
        assert parse(Options, words, recipe) == Options(out=Path("other"))
    assert parse(Options, ["--limit", "9", "--config", str(other)], recipe).limit == 9


LAUGHS = "a0: &a0 ha\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
"""Few bytes that stand for a billion values."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: x\nlimt: 3\n", "unknown key limt; nearest known: limit."),
        ("out: x\nmodel:\n  backbon: a\n", "nearest known: model.backbone"),
        ("limit: many\n", "many"),
        ("out: [\n", "expected a recipe in YAML, found: "),
        ("", "expected keys and their values, found None."),
        (None, "expected a recipe, found nothing there."),
        ("out: null\n", "out: expected a value, found null."),
        ("out: x\nepsilon: null\n", "epsilon: expected a value, found null."),
        ("out: x\nepsilon: 1e309\n", "expected a number or a fraction such as 8/255, found "),
        ("out: x\nmodel: other.yaml\n", "model: expected a group of keys, found 'other.yaml'."),
        ("out: x\nlimit: 0\n", "--limit: expected at least 1, found 0."),  # by the dataclass
        ("out: x\nmodel: &a {backbone: *a}\n", "aliases for what is complete, found *a."),
        (LAUGHS, "at most 10,000 values, found more."),
        (f"out: {'[' * 30}", "at most 20 levels, found more."),
        ("#" * 300_000, "of at most 262,144 bytes, found 300,000."),
    ],
    ids=lambda text: str(text)[:20],
)
def test_bad_config_is_bad_input(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"^{path}: ") as raised:
        parse(Options, ["--config", str(path)], path)
    assert message in str(raised.value)


def test_a_config_may_leave_what_is_required_to_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("images: d\n")
    options = parse(FileOptions, ["a.zip"], path)
    assert options == FileOptions(file=Path("a.zip"), images=Path("d"))
    path.write_text("limit: 3\n")
    assert parse(Options, ["--out", "b"], path).limit == 3


def test_a_value_in_place_of_a_group_is_bad_input(recipe: Path) -> None:
    recipe.write_text("out: x\nmodel: 5\n")
    with pytest.raises(UserError, match=r"model: expected a group of keys, found 5\."):
        parse(Options, [], recipe)


def test_a_bad_option_beside_a_config_is_a_usage_error(recipe: Path) -> None:
    for words in (["--limt", "3"], ["--limit", "config"], ["--model.x", "config"]):
        with pytest.raises(UsageError):
            parse(Options, words, recipe)


# --- a whole command

SCRIPT = '''"""Does little.

    python script.py FILE
"""

import atexit
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from robust_submission.cli.command import run
from robust_submission.cli.errors import UserError, log


@dataclass(kw_only=True)
class Options:
    """Options."""

    file: Path = field(metadata={"positional": True})
    """The file to read."""
    fail: str = ""
    """How to fail."""


def work(options: Options) -> None:
    if options.fail == "term":
        atexit.register(print, "taken apart")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            print("tidied")
    if options.fail == "note":
        log.info("%s: noted", options.file)
        log.debug("not shown")
        options.fail = ""
    if options.fail == "lost":
        raise RuntimeError(os.environ["LOST"])
    if options.fail:
        raise {"user": UserError, "stop": KeyboardInterrupt, "bug": ValueError}[options.fail](
            "a.csv: expected 1, found 2."
        )
    print("did", options.file)


run(work, Options)
'''


@pytest.fixture
def script(tmp_path: Path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)

    def call(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: text for name, text in os.environ.items() if name != "ROBUST_TRACEBACK"}
        command = [sys.executable, str(path), *words]
        return subprocess.run(
            command, capture_output=True, text=True, env={**kept, "COLUMNS": "200", **environment}
        )

    return call


@pytest.mark.parametrize(
    ("fail", "status", "stdout", "stderr"),
    [
        ("", 0, "did x.csv\n", ""),
        ("user", 1, "", "error: a.csv: expected 1, found 2.\n"),
        ("stop", 130, "", "error: interrupted.\n"),
        ("term", 143, "tidied\n", ""),
        ("note", 0, "did x.csv\n", "x.csv: noted\n"),
    ],
)
def test_exit_status(script, fail: str, status: int, stdout: str, stderr: str) -> None:
    result = script("x.csv", "--fail", fail)
    assert (result.returncode, result.stdout, result.stderr) == (status, stdout, stderr)


def test_what_the_terminal_lacks_is_escaped(script) -> None:
    result = script("é…\N{NO-BREAK SPACE}%.csv", "--fail", "note", PYTHONIOENCODING="ascii")
    written = ("did \\xe9... %.csv\n", "\\xe9... %.csv: noted\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, *written)


def test_wrong_usage(script) -> None:
    result = script("x.csv", "--fails", "user")
    expected = "error: unknown option --fails; nearest known: fail.\nSee --help.\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


def test_bugs_show_their_traceback(script) -> None:
    for word, environment in (("bug", {}), ("user", {"ROBUST_TRACEBACK": "1"})):
        result = script("x.csv", "--fail", word, **environment)
        assert result.returncode == 1 and "Traceback" in result.stderr


def test_the_end_of_another_process_is_not_a_bug(script) -> None:
    lost = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29500"
    among_others = script("x.csv", "--fail", "lost", LOCAL_RANK="0", LOST=lost)
    message = "error: another process of this run ended; its own message says why.\n"
    assert (among_others.returncode, among_others.stderr) == (1, message)
    for environment in ({"LOST": lost}, {"LOCAL_RANK": "0", "LOST": "shape mismatch"}):
        assert "Traceback" in script("x.csv", "--fail", "lost", **environment).stderr


def test_help(script) -> None:
    result = script("--help")
    assert result.returncode == 0
    words = "Does little.\n\n    python script.py FILE\n"
    for text in (words, "The file to read.", "--fail", "How to fail."):
        assert text in result.stdout


# --- ends


WAITS = """
import os, threading, time
from dataclasses import dataclass
from pathlib import Path
from robust_submission.cli import command

@dataclass
class Options:
    fifo: Path

def work(options):
    threading.Thread(target=threading.Event().wait).start()  # Python waits for it
    print("at work", flush=True)
    os.open(options.fifo, os.O_RDONLY)

command.PATIENCE = 0.5
command.run(work, Options)
"""


def test_sigterm_ends_a_command_that_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    words = [sys.executable, "-c", WAITS, "--fifo", str(tmp_path / "fifo")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "at work\n"
        process.terminate()
        assert process.wait(timeout=30) == 143


@pytest.mark.parametrize("code", ["", "0", "'done'"])
def test_code_that_exits_is_no_success(code: str) -> None:
    script = WAITS.replace("threading.Thread", f"raise SystemExit({code})\n    threading.Thread")
    words = [sys.executable, "-c", script, "--fifo", "x"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "expected code that returns, found exit(" in done.stderr
