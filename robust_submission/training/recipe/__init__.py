"""A recipe: all settings of a training run, as keyword-only dataclasses.

A YAML file in training/recipes/ sets a few keys; every key can be set on the command line
(`--optimizer.lr 1e-3`); the resolved recipe is written to the run folder.

Importing this folder takes no time: commands read recipes before they know what they are asked.
"""

from robust_submission.training.recipe.classifier import (
    MixupConfig,
    ModelConfig,
    ObjectiveConfig,
    Recipe,
)
from robust_submission.training.recipe.run import (
    DataConfig,
    ExtraConfig,
    OptimizerConfig,
    RulesConfig,
    RunRecipe,
    as_plain,
    require,
)
from robust_submission.training.recipe.trn import (
    AttackConfig,
    RestorationConfig,
    TRNConfig,
    TRNRecipe,
)

__all__ = [
    "AttackConfig",
    "DataConfig",
    "ExtraConfig",
    "MixupConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Recipe",
    "RestorationConfig",
    "RulesConfig",
    "RunRecipe",
    "TRNConfig",
    "TRNRecipe",
    "as_plain",
    "require",
]
