"""Draw a run's losses and accuracies by epoch.

    python training/show_curves.py --run runs/cifar10_fast --out curves.png

Reads metrics.csv, also while the run continues. The epoch that was kept is marked.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robust_submission.cli.command import run
from robust_submission.cli.documents import open_file
from robust_submission.cli.errors import UserError
from robust_submission.cli.files import atomic_write, check_writable, checkpoint_files

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLORS = {
    "train_loss": "#5a6172",
    "val_loss": "#5a6172",
    "val_accuracy": "#b34a00",
    "val_robust_accuracy": "#005f9e",
    "val_restored_accuracy": "#005f9e",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw."""

    run: Path
    """The run folder."""
    out: Path
    """A PNG file."""


def read_metrics(folder: Path) -> "pd.DataFrame":
    """The metrics of a run, one row per epoch.

    Raises:
        UserError: There are none, or they are damaged.
    """
    import pandas as pd

    path = folder / "metrics.csv"
    with open_file(path, "the metrics of a run") as file:
        try:
            rows = pd.read_csv(file).select_dtypes("number")
        except ValueError as error:
            raise UserError(f"{path}: expected the metrics of a run, found {error}.") from error
    if rows.empty or not {"epoch", "train_loss", "val_accuracy"} <= set(rows.columns):
        expected = "numbers in the columns epoch, train_loss and val_accuracy"
        raise UserError(f"{path}: expected {expected}, found {list(rows)}.")
    return rows


def draw_curves(rows: "pd.DataFrame") -> "Figure":
    """The losses beside the accuracies in %."""
    from matplotlib.figure import Figure

    from robust_submission.training.run_folder import best_epoch

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for name in rows.columns.intersection(list(COLORS)):
        axes, factor = (losses, 1) if name.endswith("loss") else (accuracies, 100)
        line = "--" if name == "train_loss" else "-"
        axes.plot(rows["epoch"], factor * rows[name], line, color=COLORS[name], label=name)
    kept = best_epoch(rows.to_dict("records"))
    for axes, label in ((losses, "cross-entropy"), (accuracies, "accuracy in %")):
        axes.axvline(kept, color="#d9dce2", linewidth=4, zorder=0)
        axes.set(xlabel="epoch", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def main(options: Options) -> None:
    """Draw the curves."""
    check_writable(options.out, *checkpoint_files(options.run))
    figure = draw_curves(read_metrics(options.run))
    with atomic_write(options.out) as path:
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
    print(f"{options.out}: drawn.")


if __name__ == "__main__":
    run(main, Options)
