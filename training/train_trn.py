"""Train a TRN that restores attacked images for a trained classifier.

    accelerate launch training/train_trn.py --config training/recipes/cifar10_trn.yaml
    python inference/predict.py --checkpoint runs/cifar10 --trn runs/cifar10_trn --out sub.csv

Adversarial images are made during training, by attackers who know the classifier but not the TRN;
one with `adaptive: true` knows both. Runs unchanged under python, accelerate launch and torchrun.
The run folder holds the best TRN, or classifier and TRN if both are trained
(`objective.end_to_end`), metrics.csv, recipe.yaml and the state to resume. In metrics.csv,
`val_accuracy` is the accuracy on clean images through the TRN, and `val_restored_accuracy` that on
images which an attacker who does not know the TRN made with PGD; an image counts only if it is also
classified correctly when clean, since the direction of an attack depends on the label. With an
adaptive attack, `val_robust_accuracy` is the same under PGD through the TRN, and chooses the best
epoch. inference/evaluate.py measures all attackers.
"""

from pathlib import Path

from robust_submission.cli.command import run
from robust_submission.training.recipe import TRNRecipe

DIGITS = Path(__file__).parent / "recipes" / "digits_trn.yaml"


def train_trn(recipe: TRNRecipe) -> None:
    """Train as the recipe says."""
    from robust_submission.training.build import build_trn_training
    from robust_submission.training.loop import run_training

    run_training(recipe, build_trn_training)


if __name__ == "__main__":
    run(train_trn, TRNRecipe, default_config=DIGITS)
