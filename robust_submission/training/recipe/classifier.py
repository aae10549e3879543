"""The recipe of a classifier: its network, and what is minimised."""

from dataclasses import dataclass, field, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

from robust_submission.cli.command import Ratio
from robust_submission.training.recipe.run import RunRecipe, require


@dataclass(kw_only=True)
class ModelConfig:
    """The classifier."""

    backbone: str = "convnext_tiny"
    """Any timm model."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the timm model, such as {patch_size: 2}."""
    stem: Literal["patch", "conv"] = "patch"
    """patch: the network as it comes; conv: a ConvNeXt with two 3x3 convolutions in place of
    patches, which learns robustness better (Singh et al. 2023)."""
    pretrained: bool = False
    """Start from timm's pretrained weights of the backbone, from the Hugging Face Hub or its cache
    (safetensors alone); the head is new where the classes differ."""
    freeze_epochs: int = 0
    """Epochs at the start that train the head alone; the rest is in eval mode."""
    image_size: int = 32
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each channel (RGB, 0 to 1)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel."""
    conceal: bool = True
    """Put GCM in front of the backbone."""
    randomize: int | None = None
    """Smallest side of the random resize-and-pad in pixels; null for none."""
    compile: bool = False
    """Compile the backbone (torch.compile) for training; on one GPU as CUDA graphs, unless
    gradients are accumulated. Not possible behind a TRN."""
    channels_last: bool | None = None
    """Keep the backbone's weights in channels-last memory format; null: on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""

    def __post_init__(self) -> None:
        size = self.image_size
        require(1 <= size <= 8192, "model.image_size", "from 1 to 8192", size)
        holds, found = self.freeze_epochs >= 0, self.freeze_epochs
        require(holds, "model.freeze_epochs", "at least 0", found)
        require(all(map(isfinite, self.mean)), "model.mean", "finite numbers", self.mean)
        require(all(0 < each < inf for each in self.std), "model.std", "above 0", self.std)


OF_ATTACKS = ("norm", "epsilon", "step_size", "steps", "noise", "clip")
"""Keys of an objective that other objectives than those that train on PGD examples do not read."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    name: Literal["standard", "adversarial", "trades", "guided", "challenge"] = "standard"
    """standard: cross-entropy; adversarial: cross-entropy on PGD examples (Madry et al. 2018);
    trades: clean and PGD examples (Zhang et al. 2019); guided: the same, held together by the
    squared distance of their probabilities, for attacks of one step (GAT, Sriramanan et al. 2020);
    challenge: clean, MixUp, CutMix and FGSM images of random radius, like the challenge's 2nd
    place."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the attack."""
    epsilon: Ratio = Ratio("8/255")
    """Radius of the attack, in pixel values from 0 to 1; 0.5 is usual with norm l2."""
    step_size: Ratio | None = None
    """Step of the attack; null: 2.5 epsilon / steps, with one step 1.25 epsilon (Wong et al.
    2020)."""
    steps: int = 10
    """Steps of the attack, from a random start."""
    noise: float = 1.0
    """Radius of the random start, in units of epsilon."""
    clip: bool = True
    """Keep the attack in its ball. N-FGSM (de Jorge et al. 2022) does not: one step of size
    epsilon from noise 2, without clip."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    beta: float | None = None
    """Weight of the difference between clean and attacked images; null: 6 in trades, 10 in
    guided."""
    fall_back: bool = True
    """Continue one-step training with four steps after val_robust_accuracy has fallen below half of
    its best (catastrophic overfitting). With more steps there is only a warning."""
    awp_gamma: float = 0.0
    """Size of the adversarial weight perturbation, relative to the weights (Wu et al. 2020 use
    0.005 to 0.01); 0 for none. For objectives that attack."""
    awp_warmup: int = 0
    """Epochs before the weights are perturbed."""

    def __post_init__(self) -> None:
        found = f"{self.steps}, {self.epsilon}, {self.step_size}"
        step_size = 1 if self.step_size is None else self.step_size
        holds = self.steps >= 1 and 0 <= self.epsilon < inf and 0 < step_size < inf
        require(holds, "objective", "steps >= 1, epsilon >= 0, step_size > 0", found)
        smoothing, weights = self.label_smoothing, (self.beta or 0, self.awp_gamma, self.awp_warmup)
        require(0 <= smoothing < 1, "objective.label_smoothing", "from 0 to below 1", smoothing)
        holds, found = all(0 <= each < inf for each in weights), ", ".join(map(str, weights))
        require(holds, "objective", "beta, awp_gamma, awp_warmup >= 0", found)
        holds = not self.awp_gamma or self.attacks
        require(holds, "objective.awp_gamma", "adversarial, trades or guided", self.name)
        require(0 <= self.noise < inf, "objective.noise", "a number from 0 on", self.noise)
        unread = () if self.attacks else OF_ATTACKS
        if self.name not in ("trades", "guided"):
            unread = (*unread, "beta")
        for each in fields(self):
            same = each.name not in unread or getattr(self, each.name) == each.default
            expected = f"{each.default}, as the objective {self.name} does not read it"
            require(same, f"objective.{each.name}", expected, getattr(self, each.name))

    @property
    def attacks(self) -> bool:
        """Whether it trains on PGD examples of the given radius and steps."""
        return self.name in ("adversarial", "trades", "guided")


@dataclass(kw_only=True)
class MixupConfig:
    """MixUp and CutMix for the objective standard; off if both alphas are 0."""

    mixup_alpha: float = 0.0
    """Beta(alpha, alpha) of MixUp (Zhang et al. 2018)."""
    cutmix_alpha: float = 0.0
    """Beta(alpha, alpha) of CutMix (Yun et al. 2019)."""
    prob: float = 1.0
    """Share of images that are mixed, by one or the other."""

    def __post_init__(self) -> None:
        alphas, found = (self.mixup_alpha, self.cutmix_alpha), vars(self).values()
        holds = all(0 <= each < inf for each in alphas) and 0 <= self.prob <= 1
        require(holds, "mixup", "alphas >= 0 and prob from 0 to 1", ", ".join(map(str, found)))

    @property
    def mixes(self) -> bool:
        """Whether MixUp or CutMix is on."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


@dataclass(kw_only=True)
class Recipe(RunRecipe):
    """A training run of a classifier."""

    checkpoint: Path | None = None
    """Start from the weights of this run folder, of the same shapes; or from those of a backbone, a
    .safetensors file with timm's names, with a new head where the classes differ; null for new
    ones."""
    trn: Path | None = None
    """Train behind the TRN of this run, which is not changed; null for none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The classifier."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    mixup: MixupConfig = field(default_factory=MixupConfig)
    """MixUp and CutMix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        mixup, name = self.mixup, self.objective.name
        expected = f"both alphas 0 with the objective {name}"
        found = f"{mixup.mixup_alpha} and {mixup.cutmix_alpha}"
        require(name == "standard" or not mixup.mixes, "mixup", expected, found)
        pretrained, start = self.model.pretrained, self.checkpoint
        holds = not pretrained or start is None
        require(holds, "model.pretrained", "false with a checkpoint", "true")
        holds = not self.model.freeze_epochs or pretrained or start is not None
        expected = "0 without model.pretrained and without a checkpoint"
        require(holds, "model.freeze_epochs", expected, self.model.freeze_epochs)
        # A TRN's gradient map is differentiated again, which compiled code does not support.
        holds = self.trn is None or not self.model.compile
        require(holds, "model.compile", "false with a trn", "true")

    @property
    def starts(self) -> list[Path | None]:
        return [*super().starts, self.checkpoint, self.trn]
