"""The settings that every recipe has: data, optimiser, schedule, and how a run goes."""

from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from robust_submission.cli.command import Names
from robust_submission.cli.errors import UserError
from robust_submission.settings import StoredData


def require(holds: bool, name: object, expected: str, found: object) -> None:
    """Raise UserError for a value that a key's type allows but that makes no sense, such as NaN."""
    if not holds:
        raise UserError(f"{name}: expected {expected}, found {found}.")


@dataclass(kw_only=True)
class ExtraConfig(StoredData):
    """Images to train on besides, such as generated ones."""

    name: str = "npz"
    """As data.name."""
    fraction: float = 0.5
    """Their share in each batch, between 0 and 1."""
    teacher: Path | None = None
    """Run folder of a classifier whose predictions become the labels of images that have none."""


@dataclass(kw_only=True)
class DataConfig(StoredData):
    """The images to train on."""

    name: str = "digits"
    """digits, cifar10, svhn, fashion_mnist, folder, hf, challenge, csv or npz (see
    data/README.md)."""
    limit: int | None = None
    """Use only this many of the training images, drawn with the seed and stratified by class,
    including those held out for validation; null for all."""
    validation_fraction: float = 0.1
    """Share of the training images, above 0, held out to choose the best epoch if root has no split
    val."""
    validation_limit: int | None = None
    """Validate on at most this many of them, stratified by class; null for all."""
    extra: ExtraConfig | None = None
    """Extra images (keys name, root, fraction, teacher and others as here), a fixed share of each
    batch; an epoch has as many steps as without them; null for none."""
    augmentation: str = "light"
    """none, light (shifted crops), augmix, imagenet (random resized crops) or challenge."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """What follows it: none, randaugment (two of 15 operations; Cubuk et al. 2020, as timm's
    rand-m9-mstd0.5-inc1) or trivialaugment (one of 14; Müller & Hutter 2021)."""
    erasing: float = 0.0
    """Share of the training images in which noise replaces a box, after all else (random erasing,
    Zhong et al. 2020); 0.25 is usual on ImageNet."""
    flip: bool = True
    """Mirror half of the training images (5 % with challenge, nothing with none); off where
    left and right matter (digits)."""
    num_workers: int = 0
    """Number of processes that read and augment images; does not change the result."""
    check: bool = False
    """Read every image before training, in num_workers processes or one per core, and stop with the
    list of those that cannot be read."""
    skip_bad: bool = False
    """Check the images, and leave out those that cannot be read instead of stopping."""
    changed: bool = False
    """Resume although images were mended, added or taken away since; the classes are the same."""

    def __post_init__(self) -> None:
        for name in ("limit", "validation_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}", "at least 1", value)
        share, workers = self.validation_fraction, self.num_workers
        require(0 <= share < 1, "data.validation_fraction", "from 0 to below 1", share)
        require(0 <= workers <= 1024, "data.num_workers", "from 0 to 1024", workers)
        require(0 <= self.erasing <= 1, "data.erasing", "from 0 to 1", self.erasing)
        if self.extra:  # not in its own class, whose errors jsonargparse would wrap
            root, share = self.extra.root, self.extra.fraction
            require(root is not None, "data.extra.root", "the place of the extra images", "none")
            require(0 < share < 1, "data.extra.fraction", "between 0 and 1", share)


@dataclass(kw_only=True)
class OptimizerConfig:
    """timm's optimiser and schedule."""

    name: str = "adamw"
    """Any timm optimiser."""
    lr: float = 5e-4
    """Peak learning rate at the recipe's batch_size."""
    weight_decay: float = 0.05
    """Weight decay: decoupled in adamw, lion and muon, added to the gradient in adam, adamax and
    sgd; not applied to biases and norms."""
    layer_decay: float | None = None
    """Factor between the learning rates of a layer and the layer after it; null for none."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient; null for no limit."""
    schedule: str = "cosine"
    """Any timm schedule except plateau."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end; step, multistep and constant do not read it."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_epochs", "min_lr"):
            value = getattr(self, name)
            require(0 <= value < inf, f"optimizer.{name}", "a number from 0 on", value)
        decay, clip = self.layer_decay, self.clip_grad
        holds = decay is None or 0 < decay <= 1
        require(holds, "optimizer.layer_decay", "above 0 and up to 1", decay)
        require(clip is None or clip > 0, "optimizer.clip_grad", "above 0, or null", clip)


@dataclass(kw_only=True)
class RulesConfig:
    """What the rules of a challenge allow."""

    pretrained: bool = True
    """Weights trained elsewhere: model.pretrained, a checkpoint that is a file, a classifier that a
    function makes, or a run or teacher that itself began so."""


@dataclass(kw_only=True)
class RunRecipe:
    """The settings that every training run has."""

    output: Path = Path("runs/quickstart")
    """The run folder."""
    overwrite: bool = False
    """Replace the run in the run folder, once the new one can begin."""
    resume: bool = False
    """Continue from the last state in the run folder."""
    seed: int = 0
    """Seed of every random draw: split, order, augmentation, weights, attacks."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step, over all processes together."""
    gradient_accumulation: int = 1
    """Number of parts in which a process computes its share of a step, to fit in memory."""
    auto_batch_size: bool = False
    """Double gradient_accumulation when memory runs out; for one process only."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of accelerate; fp16 needs a GPU. GCM and gradient maps stay in float32."""
    ema_decay: float | None = None
    """Average the weights with this decay and keep the average as the best; null for none."""
    save_steps: int | None = None
    """Also save the state every this many steps and before each validation; null: per epoch."""
    trackers: Names = Names("tensorboard")
    """Trackers of accelerate to log the metrics to: tensorboard, wandb, mlflow, …"""
    data: DataConfig = field(default_factory=DataConfig)
    """What is trained on."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser and schedule."""
    rules: RulesConfig = field(default_factory=RulesConfig)
    """The challenge's rules."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        seed, steps, decay = self.seed, self.save_steps, self.ema_decay
        require(0 <= seed < 2**32, "seed", "from 0 to 2**32 - 1", seed)
        require(steps is None or steps >= 1, "save_steps", "at least 1", steps)
        require(decay is None or 0 < decay < 1, "ema_decay", "between 0 and 1", decay)

    @property
    def inputs(self) -> list[Path | None]:
        """The files and folders that the run reads."""
        extra = self.data.extra
        return [self.data.root, *([extra.root] if extra else []), *self.starts]

    @property
    def starts(self) -> list[Path | None]:
        """Checkpoints that the weights or the labels of extra images come from."""
        return [self.data.extra.teacher] if self.data.extra else []


def as_plain(recipe: RunRecipe) -> dict[str, Any]:
    """The recipe in the types of YAML: paths as text, tuples as lists, ratios as numbers.

    Without `overwrite` and `resume`, so that the file can be given to --config to repeat the run.
    """
    plain = to_jsonable_python(asdict(recipe))
    del plain["overwrite"], plain["resume"]
    return plain
