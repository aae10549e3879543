"""Launch configurations: accelerate knows their keys, two machines train as one, Slurm's script."""

import os
import shutil
import signal
import socket
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from tests.conftest import ROOT, SMALL, Started, start_command

CONFIGS = sorted((ROOT / "training/accelerate").glob("*.yaml"))
SLURM = ["bash", str(ROOT / "training/slurm.sh")]


def start(config: str, *arguments: object) -> Started:
    path = ROOT / "training/accelerate" / f"{config}.yaml"
    return start_command(launch.__file__, "--config_file", path, *arguments, cwd=ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    assert config.num_processes >= config.num_machines


def test_there_is_a_configuration_for_each_kind_of_machine() -> None:
    names = {path.stem for path in CONFIGS}
    assert names == {"cpu_2_processes", "one_gpu", "many_gpus", "several_nodes", "fsdp"}


@pytest.mark.parametrize(("config", "processes"), [("one_gpu", 1), ("many_gpus", 2)])
def test_processes_start_and_leave_no_thread(tmp_path: Path, config: str, processes: int) -> None:
    """A thread of gloo's that outlives Python may abort the process, its work done."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import atexit\n"
        "from pathlib import Path\n"
        "from psutil import Process\n"
        "from robust_submission.runtime import start_accelerator\n"
        "folder = Path(__file__).parent\n"
        "threads = Process().num_threads\n"
        "def end():\n"
        "    name = f'{accelerator.process_index} of {accelerator.num_processes}'\n"
        "    (folder / name).write_text(str(threads() - before))\n"
        "atexit.register(end)  # the first to be registered is the last to be called\n"
        "before = threads()\n"
        "accelerator = start_accelerator()\n"
        "accelerator.wait_for_everyone()\n"
        "assert accelerator.num_processes == 1 or threads() > before\n"
        "accelerator.end_training()\n"
    )
    done = start(config, "--num_processes", processes, "--main_process_port", 0, probe).wait()
    assert done.returncode == 0, done.stderr
    slow = processes == 1 < (os.cpu_count() or 1)
    assert ("OMP_NUM_THREADS=" in done.stderr) == slow, done.stderr
    left = {path.name: path.read_text() for path in tmp_path.iterdir() if path != probe}
    assert left == {f"{index} of {processes}": "0" for index in range(processes)}


def test_two_machines_train_as_one(small_run: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ("--main_process_ip", "127.0.0.1", "--main_process_port", free.getsockname()[1])
    arguments = ("training/train.py", "--output", tmp_path / "run", "--epochs", 2, *SMALL)
    machines = [
        start("several_nodes", "--num_processes", 2, *address, "--machine_rank", rank, *arguments)
        for rank in (0, 1)
    ]
    for machine in machines:
        done = machine.wait()
        assert done.returncode == 0, done.stderr
    one, both = (pd.read_csv(folder / "metrics.csv") for folder in (small_run, tmp_path / "run"))
    np.testing.assert_allclose(one, both, rtol=2e-5)
    assert len(list((tmp_path / "run/state/epoch-0002").glob("random_states_*"))) == 2


FAKES = {
    "scontrol": """
        echo "$@" >>"$LOG/scontrol"
        if [[ $1 == show ]]; then printf 'node-a7\\nnode-b1\\n'; else kill "$(<"$LOG/pid")"; fi""",
    "srun": """
        while [[ $1 == -* ]]; do echo "$1" >>"$LOG/srun"; shift; done
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & done
        wait""",
    "accelerate": """
        echo $$ >"$LOG/pid"
        printf '%s\\0' "$@" >"$LOG/accelerate-$SLURM_NODEID"
        if [[ -n ${HANG:-} ]]; then exec sleep 60; fi""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes of four GPUs, with programs that write to LOG."""
    programs, log = tmp_path / "bin", tmp_path / "log"
    programs.mkdir()
    log.mkdir()
    for name, text in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node-[a7,b1]"}
    size = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return os.environ | job | size | {"PATH": path, "LOG": str(log)}


def launched(environment: dict[str, str], node: int) -> Namespace:
    """What accelerate makes of its arguments on a node."""
    words = (Path(environment["LOG"]) / f"accelerate-{node}").read_text().split("\0")[:-1]
    assert words[0] == "launch"
    return launch.launch_command_parser().parse_args(words[1:])


def submit(environment: dict[str, str], run: Path, *arguments: str) -> list[str]:
    """Run the job; what train.py is given."""
    subprocess.run([*SLURM, str(run), *arguments], env=environment, cwd=ROOT, check=True)
    return launched(environment, 0).training_script_args


def test_slurm_starts_accelerate_on_each_node(slurm: dict[str, str], tmp_path: Path) -> None:
    arguments = submit(slurm, tmp_path / "a run", "--config", "recipe.yaml", "--data.root", "a b")
    assert arguments == [
        *("--output", str(tmp_path / "a run"), "--config", "recipe.yaml", "--data.root", "a b")
    ]
    for node in (0, 1):
        options = launched(slurm, node)
        assert (options.machine_rank, options.num_machines, options.num_processes) == (node, 2, 8)
        assert (options.main_process_ip, options.main_process_port) == ("node-a7", 24567)
        assert options.config_file == "training/accelerate/several_nodes.yaml"
        assert options.training_script == "training/train.py"
    assert (Path(slurm["LOG"]) / "scontrol").read_text() == "show hostnames node-[a7,b1]\n"
    assert "--kill-on-bad-exit=1" in (Path(slurm["LOG"]) / "srun").read_text()


def test_slurm_goes_on_with_what_there_is(slurm: dict[str, str], tmp_path: Path) -> None:
    assert submit(slurm, tmp_path)[2:] == []
    restarted = slurm | {"SLURM_RESTART_COUNT": "1"}
    assert submit(restarted, tmp_path)[2:] == ["--overwrite"]
    (tmp_path / "metrics.csv").touch()  # the node failed before the first state
    assert submit(restarted, tmp_path)[2:] == ["--overwrite"]
    (tmp_path / "summary.json").touch()  # a run of which somebody took the state away
    assert submit(restarted, tmp_path)[2:] == []
    (tmp_path / "state/epoch-0003").mkdir(parents=True)
    assert submit(slurm, tmp_path)[2:] == ["--resume"]


def test_slurm_queues_the_job_again_before_its_time_is_up(slurm: dict[str, str]) -> None:
    hanging = slurm | {"HANG": "1", "SLURM_JOB_NUM_NODES": "1"}
    job = subprocess.Popen([*SLURM, "run"], env=hanging, cwd=ROOT)
    log = Path(slurm["LOG"])
    deadline = time.monotonic() + 20
    while not (log / "accelerate-0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=20)
    assert (log / "scontrol").read_text().splitlines()[1:] == ["requeue 1234567"]


def test_slurm_script_is_sound_bash() -> None:
    assert subprocess.run(["bash", "-n", SLURM[1]]).returncode == 0
    assert subprocess.run(SLURM, capture_output=True).returncode != 0  # no run folder
    if checker := shutil.which("shellcheck"):
        done = subprocess.run([checker, SLURM[1]], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
