"""Train a classifier behind GCM; with no arguments, the quickstart recipe.

    accelerate launch training/train.py --config training/recipes/cifar10.yaml --epochs 10

Runs unchanged under python, accelerate launch and torchrun, on a CPU, one GPU or many machines.
The run folder then holds the best checkpoint, metrics.csv, recipe.yaml and the state to resume.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from robust_submission.cli.command import run
from robust_submission.models.checkpoint import load_weights
from robust_submission.training.build import build_training, start_run
from robust_submission.training.data import TrainingData, load_data
from robust_submission.training.loop import fit
from robust_submission.training.recipe import Recipe
from robust_submission.training.run_folder import RunFolder, best_epoch
from robust_submission.training.state import Training
from robust_submission.training.validation import validate

QUICKSTART = Path(__file__).parent / "recipes" / "quickstart.yaml"


def summarize(training: Training, data: TrainingData, folder: RunFolder) -> None:
    """Measure the best epoch on the test images; write summary.json and print it."""
    best = best_epoch(folder.rows)
    summary: dict[str, object] = {"best_epoch": best, **folder.rows[best - 1]}
    if data.test is not None:  # a loader is false where a process has no share
        classifier = training.whole or training.classifier
        load_weights(classifier, folder.path / "model.safetensors")
        summary |= validate(training, classifier, data.test, "test")
    if not training.accelerator.is_main_process:
        return
    folder.write_json("summary.json", summary)
    table = Table("figure", str(folder.path), title=f"best of {len(folder.rows)} epochs")
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def train(recipe: Recipe) -> None:
    """Train as the recipe says and leave a run folder."""
    accelerator, folder = start_run(recipe)
    data = load_data(recipe, recipe.model.image_size, accelerator)
    training = build_training(recipe, accelerator, data)
    folder.begin(accelerator, training.ema, data.identity())
    fit(training, data.validation, folder)
    summarize(training, data, folder)
    accelerator.end_training()


if __name__ == "__main__":
    run(train, Recipe, default_config=QUICKSTART)
