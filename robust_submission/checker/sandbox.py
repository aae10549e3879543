"""Run a program that may be a stranger's in a process of its own: few packages, little time.

What this is: a bound on time, memory and written files, a clean environment, an empty working
folder, and exactly the packages that are named, so that what runs here runs at the organisers'.
What it is not: a wall. A program that means harm can do what its user can; run it in a container.
"""

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

RESULT_BYTES = 256 << 20
POLL = 0.05


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one run."""

    seconds: float = 600.0
    memory: float = 6e9
    """Bytes of address space above what the packages themselves take."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run ended."""

    result: dict[str, Any] | None
    """What it wrote; None where it did not live to write it."""
    stage: str
    """The last thing that it began."""
    found: str
    """In words, where there is no result."""
    output: str
    """The end of what it printed."""


def required(names: Iterable[str]) -> set[importlib.metadata.Distribution]:
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
    for distribution in required(names):
        _link(distribution, folder)


def _link(distribution: importlib.metadata.Distribution, folder: Path) -> None:
    tops = {file.parts[0] for file in distribution.files or ()}
    for top in tops - {"..", "__pycache__"}:
        link, target = folder / top, Path(str(distribution.locate_file(top)))
        if not link.exists() and target.exists() and not top.endswith(".pth"):
            link.symlink_to(target.resolve())


def run_isolated(
    script: Path,
    request: dict[str, Any],
    packages: Iterable[str],
    limits: Limits,
    on_stage: Callable[[str], object],
) -> Run:
    """Run `script` under this Python with the standard library and `packages` alone.

    The script is called with the path of a JSON file: `request`, and "packages" (a folder for
    sys.path), "tools" (another, with ptflops, for when the model is loaded), "result" (where to
    write a JSON object), "stage" (where to append what it begins, one line each), "memory" (the
    limit that it sets itself once the packages are loaded).
    """
    with tempfile.TemporaryDirectory(prefix="isolated-") as name:
        base = Path(name)
        shared = ("packages", "tools", "result", "stage")
        places = {key: base / key for key in (*shared, "work", "printed")}
        for key in ("packages", "tools", "work"):
            places[key].mkdir()
        link_packages(places["packages"], packages)
        _link(importlib.metadata.distribution("ptflops"), places["tools"])
        paths = {key: str(places[key]) for key in shared}
        (base / "request").write_text(json.dumps({**request, **paths, "memory": limits.memory}))
        words = [sys.executable, "-I", "-S", "-B", str(script.resolve()), str(base / "request")]
        with places["printed"].open("wb") as printed:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                cwd=places["work"],
                env=_environment(places["work"]),
                start_new_session=True,
            )
            in_time = _wait(process, limits.seconds, places["stage"], on_stage)
        whole = in_time and process.returncode == 0
        return Run(
            result=_read_result(places["result"]) if whole else None,
            stage=_stage(places["stage"]),
            found=_ending(process.returncode, in_time, limits),
            output=_tail(places["printed"]),
        )


def _environment(home: Path) -> dict[str, str]:
    """No secrets, no GPU, no proxy: only what a program needs to start."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return {
        **environment,
        "HOME": str(home),
        "TMPDIR": str(home),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _wait(
    process: subprocess.Popen[bytes],
    seconds: float,
    stage: Path,
    on_stage: Callable[[str], object],
) -> bool:
    """Wait for the end of the process and its whole group; whether it came in time."""
    deadline, last = time.monotonic() + seconds, ""
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL)
            if (now := _stage(stage)) != last:
                on_stage(now)
                last = now
        return process.poll() is not None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stage(path: Path) -> str:
    lines = _tail(path).splitlines()
    return lines[-1] if lines else "starting Python"


def _tail(path: Path, size: int = 4000) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read(size).decode(errors="replace")


def _read_result(path: Path) -> dict[str, Any] | None:
    """JSON and nothing but JSON: what a stranger wrote is never unpickled."""
    if not path.is_file() or path.stat().st_size > RESULT_BYTES:
        return None
    try:
        result = json.loads(path.read_bytes())
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


def _ending(status: int | None, in_time: bool, limits: Limits) -> str:
    if not in_time:
        return f"still running after {limits.seconds:g} s"
    if status is not None and status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"it ended by itself with status {status}"
