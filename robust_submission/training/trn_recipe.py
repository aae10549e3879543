"""The recipe of a TRN: the classifier that it protects, the attacks that it sees, its losses."""

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from robust_submission.attacks import PGD, build_attack
from robust_submission.cli.command import Ratio
from robust_submission.cli.errors import UserError
from robust_submission.models.trn.gradient_map import Estimator
from robust_submission.training.recipe import RunRecipe


@dataclass(kw_only=True)
class TRNConfig:
    """The network; see models/trn/network.py."""

    width: int = 48
    """Channels of each stream."""
    depth: int = 4
    """Pairs of residual blocks, each followed by a Fusion Block."""
    stride: int = 2
    """Side in pixels of the patches that the streams work on."""
    streams: Literal["both", "image", "gradient"] = "both"
    """The streams that there are."""
    fusion: Literal["fusion", "concatenation"] = "fusion"
    """Fusion Blocks, or streams that meet at the end only."""
    estimator: Estimator = "predicted"
    """The label-free loss whose gradient is the map: predicted, expected or average."""
    top_k: int | None = None
    """Classes of the estimator average; null for all."""
    start: Path | None = None
    """Start from the weights of this TRN's run, of the same shapes; null for fresh ones."""
    surrogate: dict[str, Any] | None = None
    """Arguments of the small network that gives the map, such as {widths: [32, 64], depth: 2};
    null takes the classifier's own gradient."""


@dataclass(kw_only=True)
class AttackConfig:
    """One of the attacks that make training images."""

    name: Literal["pgd", "fgsm", "ffgsm", "bim", "mim", "noise"] = "pgd"
    """The attack."""
    epsilon: Ratio = Ratio("8/255")
    """Radius in L-infinity, in pixel values from 0 to 1."""
    steps: int = 10
    """Steps of pgd, bim and mim."""
    weight: float = 1.0
    """How often it is drawn, relative to the other attacks."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < inf:
            raise UserError(f"objective.attacks: expected weight > 0, received {self.weight}.")
        self.build()

    def build(self) -> PGD:
        """The attack."""
        options = {"steps": self.steps} if self.name in ("pgd", "bim", "mim") else {}
        attack = build_attack(self.name, self.epsilon, "linf", **options)
        assert isinstance(attack, PGD)
        return attack


@dataclass(kw_only=True)
class RestorationConfig:
    """What is minimised, and on which images."""

    attacks: list[AttackConfig] = field(default_factory=lambda: [AttackConfig()])
    """The attacks, drawn image by image; their victim is the classifier without TRN."""
    clean: float = 0.25
    """Share of the images that are left as they are, so that TRN learns to leave them alone."""
    cache: bool = False
    """Keep each image's attacked version and show it again in every epoch: for classifiers that
    are slow to attack. Needs augmentation none, flip false and a classifier that is not trained
    along."""
    reconstruction: float = 10.0
    """Weight of the mean absolute difference to the clean image."""
    cross_entropy: float = 1.0
    """Weight of the classifier's cross-entropy on the restored image."""
    feature: float = 0.0
    """Weight of the relative difference of the classifier's last features to those of the clean
    image (Liao et al. 2018); needs a timm backbone."""
    distillation: float = 1.0
    """Weight of the surrogate's distance to the classifier: logits and gradient maps."""
    end_to_end: bool = False
    """Train the classifier along; the run folder then holds both, as a checkpoint."""

    def __post_init__(self) -> None:
        weights = (self.reconstruction, self.cross_entropy, self.feature, self.distillation)
        positive = all(0 <= each < inf for each in weights)
        if not positive or not 0 <= self.clean <= 1 or not self.attacks:
            raise UserError(
                "objective: expected attacks, weights of at least 0 and clean from 0 to 1, "
                f"received {len(self.attacks)} attacks, {weights}, {self.clean}."
            )
        if self.end_to_end and (self.cache or not (self.cross_entropy or self.feature)):
            raise UserError(
                "objective.end_to_end: expected cache false and a weight of cross_entropy or "
                f"feature, received {self.cache}, {self.cross_entropy} and {self.feature}."
            )


@dataclass(kw_only=True)
class TRNRecipe(RunRecipe):
    """A training run of a TRN."""

    output: Path = Path("runs/digits_trn")
    """The run folder."""
    checkpoint: Path | None = None
    """Run folder of the trained classifier."""
    model: str | None = None
    """Instead of a checkpoint: package.module:function, or path/file.py:function, that gives a
    RobustClassifier."""
    trn: TRNConfig = field(default_factory=TRNConfig)
    """The network."""
    objective: RestorationConfig = field(default_factory=RestorationConfig)
    """What is minimised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.checkpoint is None) == (self.model is None):
            raise UserError("expected either checkpoint or model, received both or neither.")
        if self.objective.cache and (self.data.augmentation != "none" or self.data.flip):
            raise UserError("objective.cache: expected data.augmentation none, data.flip false.")

    @property
    def inputs(self) -> list[Path | None]:
        return [*super().inputs, self.checkpoint, self.trn.start]
