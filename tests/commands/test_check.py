"""check.py prints the table; its exit status tells whether a check failed."""

import zipfile
from pathlib import Path

from tests.conftest import run_command


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
