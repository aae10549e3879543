"""The recipe of a TRN: its network, the attacks that it sees, and its loss."""

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from robust_submission.cli.command import Ratio
from robust_submission.training.recipe.run import RunRecipe, require


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
    """The streams that the network has."""
    fusion: Literal["fusion", "concatenation"] = "fusion"
    """Fusion Blocks, or streams that are concatenated at the end only."""
    estimator: Literal["predicted", "expected", "average"] = "predicted"
    """The label-free loss whose gradient is the map: predicted, expected or average."""
    top_k: int | None = None
    """Number of classes that the estimator average uses; null for all."""
    start: Path | None = None
    """Start from the weights of this TRN's run, of the same shapes; null for new ones."""
    surrogate: dict[str, Any] | None = None
    """Arguments of the small network that computes the gradient map, such as {widths: [32, 64],
    depth: 2}; null uses the classifier's own gradient."""


@dataclass(kw_only=True)
class AttackConfig:
    """One of the attacks that make the training images."""

    name: Literal["pgd", "fgsm", "ffgsm", "bim", "mim", "noise"] = "pgd"
    """The attack."""
    epsilon: Ratio = Ratio("8/255")
    """Radius in L-infinity, in pixel values from 0 to 1."""
    steps: int = 10
    """Steps of pgd, bim and mim."""
    weight: float = 1.0
    """How often it is drawn, relative to the other attacks."""
    adaptive: bool = False
    """Attack the classifier behind its TRN, through the gradient map too (second order); else the
    classifier alone."""

    def __post_init__(self) -> None:
        require(0 < self.weight < inf, "objective.attacks", "weight > 0", self.weight)
        require(0 <= self.epsilon < inf, "objective.attacks", "epsilon >= 0", self.epsilon)
        require(self.steps >= 1 or not self.options, "objective.attacks", "steps >= 1", self.steps)

    @property
    def options(self) -> dict[str, int]:
        """What else `build_attack` needs."""
        return {"steps": self.steps} if self.name in ("pgd", "bim", "mim") else {}


@dataclass(kw_only=True)
class RestorationConfig:
    """What is minimised, and on which images."""

    attacks: list[AttackConfig] = field(default_factory=lambda: [AttackConfig()])
    """The attacks, drawn per image."""
    clean: float = 0.25
    """Share of the images that are not attacked, so that TRN learns not to change them."""
    cache: bool = False
    """Attack each image once and use the result in every epoch, for classifiers that are slow to
    attack. Needs augmentation and policy none, flip false, erasing 0, end_to_end false and no
    attack that is adaptive."""
    reconstruction: float = 10.0
    """Weight of the mean absolute difference to the clean image."""
    cross_entropy: float = 1.0
    """Weight of the classifier's cross-entropy on the restored image."""
    feature: float = 0.0
    """Weight of the relative difference between the classifier's last features and those of the
    clean image (Liao et al. 2018); needs a timm backbone."""
    distillation: float = 1.0
    """Weight of the surrogate's distance to the classifier: logits and gradient maps."""
    end_to_end: bool = False
    """Train the classifier too; the run folder then holds both, as one checkpoint."""

    def __post_init__(self) -> None:
        weights = (self.reconstruction, self.cross_entropy, self.feature, self.distillation)
        holds = all(0 <= each < inf for each in weights) and 0 <= self.clean <= 1 and self.attacks
        expected = "attacks, weights of at least 0 and clean from 0 to 1"
        found = f"{len(self.attacks)} attacks, {weights}, {self.clean}"
        require(bool(holds), "objective", expected, found)
        trains = self.cross_entropy or self.feature
        expected = "cache false and a weight of cross_entropy or feature"
        found = f"{self.cache}, {self.cross_entropy} and {self.feature}"
        holds = not self.end_to_end or (trains and not self.cache)
        require(bool(holds), "objective.end_to_end", expected, found)
        holds = not (self.cache and self.adaptive)
        require(holds, "objective.cache", "no attack that is adaptive", "one")

    @property
    def adaptive(self) -> bool:
        """Whether an attacker knows of the TRN."""
        return any(each.adaptive for each in self.attacks)


@dataclass(kw_only=True)
class TRNRecipe(RunRecipe):
    """A training run of a TRN."""

    output: Path = Path("runs/digits_trn")
    """The run folder."""
    checkpoint: Path | None = None
    """Run folder of the trained classifier."""
    model: str | None = None
    """Instead of a checkpoint: package.module:function, or path/file.py:function, that returns a
    RobustClassifier."""
    trn: TRNConfig = field(default_factory=TRNConfig)
    """The network."""
    objective: RestorationConfig = field(default_factory=RestorationConfig)
    """What is minimised."""

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = (self.checkpoint is None) != (self.model is None)
        require(holds, "checkpoint", "either checkpoint or model", "both or neither")
        data = self.data
        found = (data.augmentation, data.policy, data.flip, data.erasing)
        expected = "data.augmentation and data.policy none, data.flip false and data.erasing 0"
        holds = not self.objective.cache or found == ("none", "none", False, 0)
        require(holds, "objective.cache", expected, ", ".join(map(str, found)))

    @property
    def starts(self) -> list[Path | None]:
        return [*super().starts, self.checkpoint, self.trn.start]
