"""check.py prints the table; its exit status tells whether a check failed."""

import os
import signal
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from robust_submission.checker.sandbox import namespaces
from robust_submission.cli.command import parse
from submission.check import Options
from tests.conftest import run_command, running, start_command, wait_until


def test_a_failed_check_is_status_1_and_markup_is_text(tmp_path: Path):
    path = tmp_path / "a[red].zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.py", r"raise ValueError('bad [b] \[/INST]')")
    done = run_command("submission/check.py", path, "--num_classes", 5, "--image_size", 16)
    assert done.returncode == 1 and done.stderr.endswith("a[red].zip: 1 check failed: loading.\n")
    assert "a[red].zip" in done.stdout and r"ValueError: bad [b] \[/INST]" in done.stdout


def test_options_are_checked(tmp_path: Path):
    done = run_command("submission/check.py", tmp_path / "a.zip", "--timeout", 0)
    assert (done.returncode, done.stderr) == (
        1,
        "error: --timeout: expected more than 0, found 0.0.\n",
    )


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (125, 1)])
def test_container(tmp_path: Path, status: int, expected: int):
    """The engine gets what is to be checked and every option; its end is the command's."""
    engine, heard = tmp_path / "engine", tmp_path / "heard"
    engine.write_text(
        f'#!/bin/sh\n[ $1 = run ] || exit 0\nprintf "%s\\n" "$@" > {heard}\nexit {status}'
    )
    engine.chmod(0o755)
    file, images = tmp_path / "a b.zip", tmp_path / "images"
    images.mkdir()
    file.touch()
    options = ("--images", images, "--num_classes", 5, "--packages", "torch,numpy,scipy")
    done = run_command(
        "submission/check.py",
        *(file, "--container", *options),
        environment={"CONTAINER_ENGINE": str(engine)},
    )
    assert done.returncode == expected, done.stderr
    assert ("found status 125 of" in done.stderr) == (status == 125)
    words = heard.read_text().splitlines()
    place = words.index("robust-submission")
    for strict in ("--network none", "--read-only", "--cap-drop ALL", "--pull never"):
        assert strict in " ".join(words[:place])
    mounts = [word for word in words[:place] if word.startswith("type=bind")]
    assert mounts == [
        f"type=bind,source={file},target=/in/submission.zip,readonly",
        f"type=bind,source={images},target=/images,readonly",
    ]
    assert words[place - 2 : place + 2] == [
        *("--entrypoint", "python", "robust-submission", "/app/submission/check.py")
    ]
    inside = parse(Options, words[place + 2 :])
    given = parse(Options, [str(file), *map(str, options)])
    places = {"file": Path("/in/submission.zip"), "images": Path("/images")}
    assert inside == replace(given, **places)


@pytest.mark.skipif(not namespaces(), reason="Linux allows no namespaces here")
def test_a_killed_check_leaves_no_process(tmp_path: Path):
    pause = f"2000.{os.getpid()}"
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.py", f"import subprocess\nsubprocess.run(['sleep', '{pause}'])")
    started = start_command("submission/check.py", path, environment={"TMPDIR": str(tmp_path)})
    wait_until(lambda: running(pause))
    os.kill(started.pid, signal.SIGKILL)
    assert started.wait().returncode == -signal.SIGKILL
    wait_until(lambda: not running(pause))
