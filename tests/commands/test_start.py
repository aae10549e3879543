"""Commands read their options before they import what takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("data", "training", "inference", "submission")
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for name in FOLDERS for path in ROOT.glob(f"{name}/*.py")
)
HEAVY = {
    *("torch", "torchvision", "timm", "accelerate", "datasets", "pandas", "scipy", "sklearn"),
    *("albumentations", "cv2", "matplotlib", "onnx", "onnxruntime", "huggingface_hub"),
}
PROGRAM = """
import contextlib, io, json, os, runpy, sys
script, word = sys.argv[1:]
sys.argv = [script, word]
try:
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, [*sys.modules], os.environ["OMP_WAIT_POLICY"]]))
"""


@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("--no_such_option", 2)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_usage_errors_import_nothing_that_takes_seconds(
    script: str, word: str, status: int
):
    words = [sys.executable, "-c", PROGRAM, str(ROOT / script), word]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path("/"))
    found, modules, waiting = json.loads(done.stdout)
    assert found == status, done.stderr
    assert waiting == "PASSIVE"
    assert not HEAVY & {name.partition(".")[0] for name in modules}


def test_evaluation_and_prediction_begin_without_what_only_a_report_needs():
    program = "import json, sys, robust_submission.api, robust_submission.prediction.writer as _\n"
    words = [sys.executable, "-c", f"{program}print(json.dumps([*sys.modules]))"]
    modules = set(json.loads(subprocess.check_output(words, cwd=ROOT)))
    assert "torch" in modules
    assert not {"albumentations", "datasets", "matplotlib", "pandas", "scipy.stats"} & modules
