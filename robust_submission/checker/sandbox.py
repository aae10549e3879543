"""Run code that may be a stranger's in a process of its own: few packages, little time.

What it does: it bounds time, memory and the size of files, starts from a clean environment and an
empty working folder, and links exactly the named packages, so that what runs here also runs at the
organisers'. Whatever it started ends with it. Where Linux allows, it has namespaces of its own: no
network, no other process in sight. It is no wall: a malicious program can read and write your
files, so check what you distrust in a container (container.py).
"""

import contextlib
import ctypes
import importlib.metadata
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

HERE = Path(__file__).parent
RESULT_BYTES = 256 << 20
POLL_SECONDS = 0.05
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36  # of <linux/prctl.h>
Walls = Literal["container", "namespaces", "none"]
"""A container of docker or podman without a network, namespaces of its own, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one run."""

    seconds: float = 600.0
    memory: float = 6e9
    """Bytes of address space above what the packages themselves take."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run ended."""

    end: Literal["exited", "late", "killed"]
    """By itself, at the time limit, or by a signal."""
    found: str
    """The same in words."""
    stage: str
    """The last thing that it began."""
    output: str
    """The end of what it printed."""
    result: bytes | None = None
    """What it wrote; None unless it exited with status 0 and wrote a whole result."""
    walls: Walls = "namespaces"
    """What was around it."""


def _required(names: Iterable[str]) -> set[importlib.metadata.Distribution]:
    """The named distributions and all that they require."""
    found = dict[str, importlib.metadata.Distribution]()
    extras = dict[str, set[str]]()
    todo = [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        key = wanted.name.lower().replace("_", "-")
        if key in found and wanted.extras <= extras[key]:
            continue
        try:
            found[key] = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional one, or of another system
        extras[key] = extras.get(key, set()) | wanted.extras
        for line in found[key].requires or ():
            needed = Requirement(line)
            sets = [{"extra": extra} for extra in (*extras[key], "")]
            if needed.marker is None or any(needed.marker.evaluate(each) for each in sets):
                todo.append(needed)
    return set(found.values())


def link_packages(folder: Path, names: Iterable[str]) -> None:
    """Fill `folder` with links to the named packages and all that they require, nothing else."""
    for distribution in _required(names):
        _link(distribution, folder)


def _link(distribution: importlib.metadata.Distribution, folder: Path) -> None:
    tops = {file.parts[0] for file in distribution.files or ()}
    for top in tops - {"..", "__pycache__"}:
        link, target = folder / top, Path(str(distribution.locate_file(top)))
        if not link.exists() and target.exists() and not top.endswith(".pth"):
            link.symlink_to(target.resolve())


@cache
def namespaces() -> tuple[str, ...]:
    """What to start a program with, so that it has namespaces of its own; () where Linux refuses.

    In them is no network, and no other process to see or to end. The program is their process 1:
    the kernel ends all others with it, and it ends with this process.
    """
    shut_in = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    words = ("setpriv", "--pdeathsig", "KILL", "unshare", *shut_in, "--mount-proc")
    try:
        refused = subprocess.run([*words, "true"], capture_output=True).returncode
    except FileNotFoundError:
        return ()
    return () if refused else words


def _devices() -> list[str]:
    return [each.name for each in Path("/sys/class/net").iterdir()]


def walls() -> Walls:
    """What an isolated process cannot leave."""
    # podman marks the process as well, as its file is missing where all is read-only.
    marked = Path("/.dockerenv").exists() or os.environ.get("container") == "podman"  # noqa: SIM112
    if marked and _devices() == ["lo"]:
        return "container"
    return "namespaces" if namespaces() else "none"


def run_isolated(
    worker: str,
    request: str,
    packages: Iterable[str],
    limits: Limits,
    folder: Path,
    on_stage: Callable[[str], object],
) -> Run:
    """Run a worker under this Python with the standard library and `packages` alone.

    Args:
        worker: Name of a module of this folder, see `probes.run_worker`.
        request: What it is asked.
        packages: Names of distributions; what they require comes with them.
        limits: Of time and memory.
        folder: An empty folder for it. There it finds ptflops in `tools`, and writes what it begins
            as a line of `stage`.
        on_stage: Called with each new line of `stage`.
    """
    package = __name__.rpartition(".")[0]
    for each in ("packages", "tools", "work"):
        (folder / each).mkdir()
    link_packages(folder / "packages", packages)
    _link(importlib.metadata.distribution("ptflops"), folder / "tools")
    code = folder.joinpath("code", *package.split("."))
    code.parent.mkdir(parents=True)
    code.symlink_to(HERE.resolve())  # nothing else of ours can be imported
    words = ("-S", "-P", "-B", "-m", f"{package}.{worker}", folder, int(limits.memory))
    # Request and result cross in a file without a name, which the worker alone holds open. The
    # result begins with a line of the request that the worker does not show to what it runs.
    secret = f"{secrets.token_hex()}\n".encode()
    with (
        tempfile.TemporaryFile() as exchange,
        (folder / "printed").open("wb") as printed,
        _parent_of_all(),
    ):
        exchange.write(secret + request.encode())
        exchange.seek(0)
        process = subprocess.Popen(
            [*namespaces(), sys.executable, *map(str, words)],
            stdin=exchange,
            stdout=printed,
            stderr=subprocess.STDOUT,
            cwd=folder / "work",
            env=_environment(folder),
            start_new_session=True,
        )
        in_time = _wait(process, limits.seconds, folder / "stage", on_stage)
        exchange.seek(0)
        answer = exchange.read(RESULT_BYTES)
    result = answer.removeprefix(secret) if answer.startswith(secret) else None
    return _describe_end(process.returncode, in_time, limits, folder, result)


def _environment(folder: Path) -> dict[str, str]:
    """No secrets, no GPU, no proxy: only what a program needs to start."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PYTHONPATH": f"{folder / 'packages'}:{folder / 'code'}",
        "HOME": str(folder / "work"),
        "TMPDIR": str(folder / "work"),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _wait(
    process: subprocess.Popen[bytes],
    seconds: float,
    stage: Path,
    on_stage: Callable[[str], object],
) -> bool:
    """Wait for the end of the process and of its session; whether it came in time."""
    deadline, last = time.monotonic() + seconds, ""
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            if (now := _last_stage(stage)) != last:
                on_stage(now)
                last = now
        return process.poll() is not None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _children() -> set[int]:
    """The processes whose parent is this one."""
    threads = Path("/proc/self/task").glob("*/children")
    return {int(pid) for thread in threads for pid in thread.read_text().split()}


@contextlib.contextmanager
def _parent_of_all() -> Iterator[None]:
    """End every process that is started in the block, by whomever; let none read this one.

    Those that lose their parent get this process. Its environment may hold a token. Without effect
    where the system is not Linux.
    """
    if sys.platform != "linux":
        yield
        return
    prctl, before = ctypes.CDLL(None).prctl, _children()
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    try:
        yield
    finally:
        while left := _children() - before:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _last_stage(path: Path) -> str:
    lines = _tail(path).splitlines()
    return lines[-1] if lines else "starting Python"


def _tail(path: Path, size: int = 4000) -> str:
    """The end of a file; nothing of a pipe or a link, which a model may have put in its place."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return ""
    with os.fdopen(opened, "rb") as file:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode):
            return ""
        file.seek(max(0, found.st_size - size))
        return file.read(size).decode(errors="replace")


def _describe_end(
    status: int, in_time: bool, limits: Limits, folder: Path, result: bytes | None
) -> Run:
    end, found = "exited", f"it ended by itself with status {status}"
    if not in_time:
        end, found = "late", f"still running after {limits.seconds:g} s"
    elif status < 0:
        end, found = "killed", f"killed by {signal.Signals(-status).name}"
    return Run(
        end=end,
        found=found,
        stage=_last_stage(folder / "stage"),
        output=_tail(folder / "printed"),
        result=None if status or end != "exited" else result,
        walls=walls(),
    )
