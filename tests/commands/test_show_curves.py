"""The curves of a run as a command."""

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from tests.conftest import run_command
from training.show_curves import draw_curves

SCRIPT = "training/show_curves.py"


def test_curves_of_a_run(small_run: Path, tmp_path: Path) -> None:
    words = ("--run", small_run, "--out", tmp_path / "curves.png")
    done = run_command(SCRIPT, *words)
    assert (done.returncode, done.stdout) == (0, f"{words[-1]}: drawn.\n"), done.stderr
    first = (tmp_path / "curves.png").read_bytes()
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    run_command(SCRIPT, *words)
    assert (tmp_path / "curves.png").read_bytes() == first


def test_each_figure_is_a_line_of_its_values() -> None:
    rows = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "train_loss": [2.0, 1.0, 0.5],
            "lr": [1e-3] * 3,
            "val_loss": [1.9, 1.1, 0.9],
            "val_accuracy": [0.3, 0.5, 0.6],
            "val_robust_accuracy": [0.2, 0.4, 0.1],
        }
    )
    losses, accuracies = draw_curves(rows).axes
    drawn = {str(line.get_label()): line for axes in (losses, accuracies) for line in axes.lines}
    assert list(drawn["val_robust_accuracy"].get_ydata()) == [20, 40, 10]
    assert list(drawn["train_loss"].get_ydata()) == [2.0, 1.0, 0.5]
    kept = [line for line in accuracies.lines if str(line.get_label()).startswith("_")]
    assert [list(line.get_xdata()) for line in kept] == [[2, 2]]
    assert "lr" not in drawn


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", "a,b\n1,2\n", "epoch,train_loss\n", "epoch,train_loss\n1,2\n"),
        "epoch,train_loss,val_accuracy\n1,2,much\n",
    ],
)
def test_damaged_metrics_are_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    done = run_command(SCRIPT, "--run", tmp_path, "--out", tmp_path / "curves.png")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}/metrics.csv: ")
    assert not (tmp_path / "curves.png").exists()
