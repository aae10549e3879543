"""Train a classifier behind GCM; with no arguments, the quickstart recipe.

    accelerate launch training/train.py --config training/recipes/cifar10.yaml --epochs 10

Runs unchanged under python, accelerate launch and torchrun, on a CPU, one GPU or many machines.
The run folder then holds the best checkpoint, metrics.csv, recipe.yaml and the state to resume.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.command import run
from cli.processes import start_accelerator
from cli.provenance import provenance
from models.classifier import load_weights
from training.build import TrainingData, build_training, load_data
from training.loop import Training, train_epoch, validate
from training.recipe import Recipe, as_plain
from training.run_folder import RunFolder

QUICKSTART = Path(__file__).parent / "recipes" / "quickstart.yaml"


def fit(training: Training, data: TrainingData, folder: RunFolder, first_epoch: int) -> None:
    """Train, validate, keep the best and the last epoch."""
    accelerator = training.accelerator
    for epoch in range(first_epoch, training.recipe.epochs):
        row = {"epoch": epoch + 1, **train_epoch(training, epoch)}
        row |= validate(training, training.evaluated, data.validation, "val")
        folder.rows.append(row)
        accelerator.log(row, step=epoch + 1)
        if accelerator.is_main_process:
            if folder.best_epoch() == epoch + 1:
                folder.write_best(training.evaluated)
            folder.write_metrics()
        folder.save_state(accelerator, training.ema)


def summarize(training: Training, data: TrainingData, folder: RunFolder) -> None:
    """Measure the best epoch on the test images; write summary.json and print it."""
    best = folder.best_epoch()
    summary: dict[str, object] = {"best_epoch": best, **folder.rows[best - 1]}
    if data.test:
        load_weights(training.classifier, folder.path / "model.safetensors")
        summary |= validate(training, training.classifier, data.test, "test")
    if not training.accelerator.is_main_process:
        return
    folder.write_json("summary.json", summary)
    table = Table("figure", str(folder.path), title=f"best of {len(folder.rows)} epochs")
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def train(recipe: Recipe) -> None:
    """Train as the recipe says and leave a run folder."""
    accelerator = start_accelerator(
        mixed_precision=recipe.mixed_precision,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        log_with=list(recipe.trackers),  # pyright: ignore[reportArgumentType]
        project_dir=recipe.output,
    )
    with accelerator.main_process_first():  # the others find what it made
        folder = RunFolder(recipe, is_main=accelerator.is_main_process)
    data = load_data(recipe, accelerator)
    training = build_training(recipe, accelerator, data)
    if accelerator.is_main_process:
        folder.write_yaml("recipe.yaml", as_plain(recipe))
        folder.write_json("provenance.json", provenance())
    accelerator.init_trackers("logs")
    first_epoch = folder.load_state(accelerator, training.ema) if recipe.resume else 0
    fit(training, data, folder, first_epoch)
    summarize(training, data, folder)
    accelerator.end_training()


if __name__ == "__main__":
    run(train, Recipe, default_config=QUICKSTART)
