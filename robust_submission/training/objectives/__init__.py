"""What training minimises: robust and plain classification, mixed images, restoration by a TRN."""

from robust_submission.training.objectives.adversarial import (
    ROBUST_ACCURACY,
    CrossEntropy,
    Guided,
    Trades,
    attack_revealed,
    build_objective,
    collapsed_epoch,
    perturbed_weights,
    validation_attack,
    with_more_steps,
)
from robust_submission.training.objectives.mixing import Challenge, MixedCrossEntropy, Mixing
from robust_submission.training.objectives.restoration import (
    RestorationLoss,
    RestorationObjective,
    attack_unaware,
    build_restoration,
)

__all__ = [
    "ROBUST_ACCURACY",
    "Challenge",
    "CrossEntropy",
    "Guided",
    "MixedCrossEntropy",
    "Mixing",
    "RestorationLoss",
    "RestorationObjective",
    "Trades",
    "attack_revealed",
    "attack_unaware",
    "build_objective",
    "build_restoration",
    "collapsed_epoch",
    "perturbed_weights",
    "validation_attack",
    "with_more_steps",
]
