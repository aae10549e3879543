"""The parts of a training run: what the loop, the objectives and the commands hand each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from robust_submission.data.loader import TrainingLoader
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.trn import TRN
from robust_submission.training.recipe import RunRecipe
from robust_submission.training.weight_perturbation import WeightPerturbation

Chunk = tuple[Tensor, Tensor, Tensor]
"""Images (B, 3, H, W); labels (B,) or probabilities (B, num_classes); seeds (B,)."""

Examples = tuple[Tensor, ...]
"""What an objective makes of a chunk and takes the loss of."""


class Objective(Protocol):
    """What is minimised, in two parts, so that the weights can be perturbed between them."""

    def examples(self, classifier: RobustClassifier, chunk: Chunk) -> Examples:
        """Make what the loss needs, such as adversarial examples of the bare classifier."""
        ...

    def loss(self, model: nn.Module, examples: Examples) -> Tensor:
        """The mean loss, by one forward pass of `model`: the classifier, or a parallel wrapper."""
        ...


@dataclass(kw_only=True)
class Training:
    """What a run works with; model and optimizer are accelerate's, the rest is plain."""

    recipe: RunRecipe
    accelerator: Accelerator
    classifier: RobustClassifier
    """The bare RobustClassifier inside `model`; sharded over the processes under FSDP."""
    model: nn.Module
    optimizer: Any
    scheduler: Scheduler
    objective: Objective
    fall_back: Objective | None = None
    """What takes the objective's place when its robustness has collapsed; None for nothing."""
    perturbation: WeightPerturbation | None = None
    """Of the weights under each loss; None for none."""
    validation_attacks: Mapping[str, Callable[..., Tensor]]
    """What is measured each epoch beside clean accuracy: by name, a function from classifier,
    images, labels and seeds to attacked images."""
    train_loader: TrainingLoader
    ema: ModelEmaV3 | None = None
    whole: RobustClassifier | None = None
    """Takes all the weights of a sharded classifier; None where it is not sharded."""
    repeats_attacks: bool = False
    """Whether an image's seed stays the same in every epoch."""
    keep: Callable[[RobustClassifier], RobustClassifier | TRN] = field(default=lambda model: model)
    """What of the best epoch is written to the run folder."""

    def gathered(self) -> RobustClassifier:
        """The classifier with all its weights in this process. All processes call it together."""
        if self.whole is None:
            return self.classifier
        options = StateDictOptions(full_state_dict=True)
        self.whole.load_state_dict(get_model_state_dict(self.classifier, options=options))
        return self.whole

    def evaluated(self) -> RobustClassifier:
        """The model that is validated and kept: the average where there is one. See `gathered`."""
        return cast(RobustClassifier, self.ema.module) if self.ema else self.gathered()


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that is a function of all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
