"""RobustClassifier: a timm backbone behind its defences, and `reveal`, which unmasks them.

model = RobustClassifier(class_names=["cat", "dog"], image_size=32)
model.save_pretrained("runs/pets")
model = load_checkpoint("runs/pets")
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from torch import Tensor, nn

from robust_submission.cli.documents import validated
from robust_submission.cli.errors import UserError
from robust_submission.models.configuration import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClassifierArguments,
    Stem,
)
from robust_submission.models.gcm import GCM
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.models.stem import put_conv_stem
from robust_submission.models.surgery import StraightThrough, evaluating, frozen, replaced
from robust_submission.models.trn import TRN, DifferentiableTRN
from robust_submission.models.weights import load_weights

MODEL_CARD = """---
{{ card_data }}
---

An image classifier of robust-submission. Its robustness is not known from this page:
`submission/push_to_hub.py --report` uploads a model with what an evaluation found.
"""


class Normalize(nn.Module):
    """Per-channel `(images - mean) / std`, inside the model so that attacks live in pixel space."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class RobustClassifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="robust-submission",
    pipeline_tag="image-classification",
    tags=["image-classification", "adversarial-robustness"],
    model_card_template=MODEL_CARD,
):
    """Images to logits through named stages: restore, conceal, randomize, normalize, backbone.

    A stage that is not used is an identity.

    Args:
        class_names: Names in label order; their number is the number of logits.
        backbone: A timm model name; or your own network from normalised images to logits, which
            can be trained and evaluated but not saved.
        backbone_args: Further arguments of the timm model that shape it, such as `patch_size`.
        stem: patch, the network as it comes, or conv: see `stem.put_conv_stem`.
        image_size: Side of the square input in pixels.
        mean: Per-channel mean (RGB, 0 to 1) that `normalize` subtracts.
        std: Per-channel standard deviation that `normalize` divides by.
        conceal: Put GCM (arXiv 2205.10617) in front of everything that computes.
        randomize: Arguments of `RandomResizePad` (`min_size`, `seed`), or None.
        restore: Arguments of `TRN`, or None; see also `attach_trn`.

    Raises:
        UserError: an argument of another type or range (see `configuration`), an unknown backbone,
            or a stage or a backbone that refuses its arguments.
    """

    def __init__(
        self,
        *,
        class_names: list[str],
        backbone: str | nn.Module = "convnext_tiny",
        backbone_args: dict[str, Any] | None = None,
        stem: Stem = "patch",
        image_size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        conceal: bool = True,
        randomize: dict[str, int] | None = None,
        restore: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.rebuildable = isinstance(backbone, str)
        given: dict[str, object] = {
            "class_names": class_names,
            "backbone": backbone if isinstance(backbone, str) else "",
            "backbone_args": backbone_args,
            "stem": stem,
            "image_size": image_size,
            "mean": mean,
            "std": std,
            "conceal": conceal,
            "randomize": randomize,
            "restore": restore,
        }
        validated(ClassifierArguments, given)
        self.class_names = list(class_names)
        self.image_size = image_size
        try:
            self.restore = TRN(**restore) if restore else nn.Identity()
            self.conceal = GCM() if conceal else nn.Identity()
            self.randomize = (
                RandomResizePad(image_size, **randomize) if randomize else nn.Identity()
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        self.normalize = Normalize(mean, std)
        if isinstance(backbone, str):
            backbone = _create_backbone(backbone, len(class_names), backbone_args or {})
        self.backbone = backbone
        if stem != "patch":
            put_conv_stem(backbone)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of RGB images (B, 3, H, W), floating point, 0 to 1."""
        images = self.restored(images)
        images = self.conceal(images)
        images = self.randomize(images)
        return self.classify(images)

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}"

    def restored(self, images: Tensor) -> Tensor:
        """The images as TRN restores them; without TRN, unchanged."""
        if isinstance(self.restore, nn.Identity):
            return images
        # The gradient map must not depend on the batch or on dropout, nor on gradients of weights.
        with evaluating(self.backbone), frozen(self.backbone):
            return self.restore(images, self.classify)

    def classify(self, images: Tensor) -> Tensor:
        """Logits without restoring, concealing or randomizing: the source of gradient maps."""
        return self.backbone(self.normalize(images))

    def attach_trn(self, trn: TRN) -> None:
        """Put a trained TRN in front, to be saved with the model.

        Raises:
            UserError: its surrogate has another number of classes.
        """
        surrogate = trn.surrogate
        if surrogate and surrogate.head.out_features != len(self.class_names):
            classes = f"{len(self.class_names)} classes, found {surrogate.head.out_features}"
            raise UserError(f"TRN: expected a surrogate of {classes}.")
        self.restore = trn
        config: Any = self._hub_mixin_config  # what PyTorchModelHubMixin saves
        config["restore"] = trn.arguments

    def _save_pretrained(self, save_directory: Path) -> None:
        if not self.rebuildable:
            found = type(self.backbone).__name__
            expected = "expected a backbone of timm, given by its name, to save"
            raise UserError(f"{expected}: found a {found}.")
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **arguments: Any) -> "RobustClassifier":
        """Build the model from its config and load its tensors: safetensors only, strictly."""
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        hub = {name: arguments.pop(name) for name in names}
        weights = Path(model_id) / SAFETENSORS_SINGLE_FILE
        if not Path(model_id).is_dir():
            weights = Path(hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **hub))
        model = cls(**arguments)
        load_weights(model, weights)
        return model.eval()


def _create_backbone(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; nearest known: {nearest[0]}" if nearest else ""
        raise UserError(f"backbone: expected a timm model, received {name!r}{hint}.")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that it does not have
        raise UserError(f"backbone: expected a timm model, received {name!r}: {error}") from error
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **arguments)
    except Exception as error:  # timm's networks check their arguments in every way there is
        if not arguments:
            raise
        found = str(error) or type(error).__name__
        raise UserError(f"backbone_args: expected those of {name}, found: {found}.") from error


def reveal(model: nn.Module, *, bypass: bool = False) -> nn.Module:
    """The same weights and logits with honest gradients: the view of an adaptive attacker.

    Every GCM, at any depth of any model, passes the gradient straight through (BPDA, Athalye et al.
    2018). A TRN is differentiated, through its gradient map too (second order), or with `bypass`
    passes the gradient straight through as well. Random stages stay, seeded: average over
    `set_draw` for their expectation. Parameters and mode are shared with `model`, which is left as
    it is. A model without these stages is returned itself.
    """

    def substitute(stage: nn.Module) -> nn.Module | None:
        if isinstance(stage, (StraightThrough, DifferentiableTRN)):
            return stage
        if isinstance(stage, TRN) and not bypass:
            return DifferentiableTRN(stage)
        return StraightThrough(stage) if isinstance(stage, (GCM, TRN)) else None

    return replaced(model, substitute)


def undefended(model: nn.Module) -> nn.Module:
    """The same weights without GCM, random stages and TRN: the model to transfer attacks from.

    A model without these stages is returned itself.
    """
    stages = (GCM, RandomResizePad, TRN)
    return replaced(model, lambda stage: nn.Identity() if isinstance(stage, stages) else None)


def random_stages(model: nn.Module) -> list[RandomResizePad]:
    """The stages of `model` whose output depends on a draw; empty for a deterministic model."""
    return [stage for stage in model.modules() if isinstance(stage, RandomResizePad)]


@contextmanager
def held_draws(model: nn.Module, keys: Tensor) -> Iterator[None]:
    """Draw by these keys (B,), int64, from 0, and no longer by the images of a batch of B."""
    stages = random_stages(model)
    for stage in stages:
        stage.keys = keys
    try:
        yield
    finally:
        for stage in stages:
            del stage.keys


def set_draw(model: nn.Module, draw: int) -> None:
    """Switch every random stage of `model` to its `draw`-th independent draw."""
    for stage in random_stages(model):
        stage.draw = draw
