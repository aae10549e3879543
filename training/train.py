"""Train a classifier behind GCM; with no arguments, the quickstart recipe.

    accelerate launch training/train.py --config training/recipes/cifar10.yaml --epochs 10

Runs unchanged under python, accelerate launch and torchrun, on a CPU, one GPU or many machines.
The run folder then holds the best checkpoint, metrics.csv, recipe.yaml and the state to resume.
"""

from pathlib import Path

from robust_submission.cli.command import run
from robust_submission.training.recipe import Recipe

QUICKSTART = Path(__file__).parent / "recipes" / "quickstart.yaml"


def train(recipe: Recipe) -> None:
    """Train as the recipe says, and report the best epoch's accuracy on the test images."""
    from robust_submission.training.build import build_training
    from robust_submission.training.loop import run_training, summarize

    run_training(recipe, build_training, summarize)


if __name__ == "__main__":
    run(train, Recipe, default_config=QUICKSTART)
