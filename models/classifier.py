"""RobustClassifier: a timm backbone behind its defences, and `reveal`, which takes their masks off.

model = RobustClassifier(class_names=["cat", "dog"], image_size=32)
model.save_pretrained("runs/pets")
model = load_checkpoint("runs/pets")
"""

import copy
import difflib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.gcm import GCM, StraightThroughGCM
from models.replace import replaced
from models.resize_pad import RandomResizePad

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


class RobustClassifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="robust-submission",
    tags=["image-classification", "adversarial-robustness"],
):
    """Images to logits through named stages: restore, conceal, randomize, normalize, backbone.

    A stage that is not used is an identity.

    Args:
        class_names: Names in label order; their number is the number of logits.
        backbone: Any timm model name.
        backbone_args: Further arguments of the timm model, such as `patch_size`.
        image_size: Side of the square input in pixels.
        mean: Per-channel mean (RGB, 0 to 1) that `normalize` subtracts.
        std: Per-channel standard deviation that `normalize` divides by.
        conceal: Put GCM (arXiv 2205.10617) before everything that computes.
        randomize: Arguments of `RandomResizePad` (`min_size`, `seed`), or None.

    Raises:
        ValueError: no class, an unknown backbone, or a backbone that refuses its arguments.
    """

    def __init__(
        self,
        *,
        class_names: list[str],
        backbone: str = "convnext_tiny",
        backbone_args: dict[str, Any] | None = None,
        image_size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        conceal: bool = True,
        randomize: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        if not class_names:
            raise ValueError("class_names: expected at least one class, received none.")
        self.class_names = list(class_names)
        self.image_size = image_size
        self.restore = nn.Identity()
        self.conceal = GCM() if conceal else nn.Identity()
        self.randomize = RandomResizePad(image_size, **randomize) if randomize else nn.Identity()
        self.normalize = Normalize(mean, std)
        self.backbone = _create_backbone(backbone, len(class_names), backbone_args or {})

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of RGB images (B, 3, H, W), floating point, 0 to 1."""
        images = self.restore(images)
        images = self.conceal(images)
        images = self.randomize(images)
        return self.backbone(self.normalize(images))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> "RobustClassifier":
        """Build the model from its config and load its tensors: safetensors only, strictly."""
        if Path(model_id).is_dir():
            weights = Path(model_id) / SAFETENSORS_SINGLE_FILE
        else:
            download = hf_hub_download(
                model_id,
                SAFETENSORS_SINGLE_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
            weights = Path(download)
        model = cls(**model_kwargs)
        load_weights(model, weights)
        return model.eval()


def _create_backbone(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; nearest known: {nearest[0]}" if nearest else ""
        raise ValueError(f"backbone: expected a timm model, received {name!r}{hint}.")
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **arguments)
    except TypeError as error:
        raise ValueError(f"backbone_args of {name}: {error}.") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load every tensor of a safetensors file into `model`, strictly.

    Raises:
        ValueError: the file is missing or not safetensors, or its tensors are not those of the
            model (the first difference is named).
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, found none.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, found other bytes: {error}."
        ) from error
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{path}: expected the tensor {name}, found none of that name.")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: expected {name} of shape {tuple(tensor.shape)}, "
                f"found {tuple(found[name].shape)}."
            )
    if foreign := sorted(found.keys() - expected.keys()):
        raise ValueError(
            f"{path}: expected the model's tensors alone, found {len(foreign)} more: {foreign[0]}."
        )
    model.load_state_dict(found, strict=True)


def load_checkpoint(path: str | Path) -> RobustClassifier:
    """The classifier of a run folder, in eval mode on the CPU.

    Args:
        path: A folder with config.json and model.safetensors.

    Raises:
        ValueError: either file is missing, damaged, or they do not belong together.
    """
    config = Path(path) / CONFIG_NAME
    if not Path(path).is_dir():
        raise ValueError(f"{path}: expected the folder of a checkpoint, found none.")
    if not config.is_file():
        raise ValueError(f"{path}: expected a checkpoint with {CONFIG_NAME}, found none in it.")
    _check_config(config)
    return RobustClassifier.from_pretrained(path)


def _check_config(path: Path) -> None:
    """Raise ValueError unless the file holds arguments of RobustClassifier and nothing else."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, found {error}.") from error
    known = inspect.signature(RobustClassifier).parameters
    if not isinstance(config, dict) or "class_names" not in config:
        raise ValueError(f"{path}: expected a JSON object with class_names, found none.")
    if unknown := sorted(config.keys() - known.keys()):
        raise ValueError(
            f"{path}: expected arguments of RobustClassifier ({', '.join(known)}), "
            f"found {unknown[0]}."
        )


def reveal(model: nn.Module) -> nn.Module:
    """The same weights and logits with honest gradients: what an attacker who knows all uses.

    Every GCM, at any depth of any model, passes the gradient straight through (BPDA). Randomness
    stays, seeded: average over `set_draw` for its expectation. Parameters and mode are shared with
    `model`, which is left as it is. A model that hides nothing that we know of is returned itself.
    """
    return _exchanged(model, _reveal_stage)


def undefended(model: nn.Module) -> nn.Module:
    """The same weights without GCM, random stages and restoration: the twin to transfer from.

    A model without any of them is returned itself.
    """
    twin = _exchanged(model, _drop_stage)
    if isinstance(twin, RobustClassifier) and not isinstance(twin.restore, nn.Identity):
        twin = copy.copy(twin)
        twin._modules = {**twin._modules, "restore": nn.Identity()}
    return twin


def _reveal_stage(stage: nn.Module) -> nn.Module | None:
    if not isinstance(stage, GCM) or isinstance(stage, StraightThroughGCM):
        return None
    return StraightThroughGCM(stage.omega, stage.epsilon)


def _drop_stage(stage: nn.Module) -> nn.Module | None:
    return nn.Identity() if isinstance(stage, (GCM, RandomResizePad)) else None


def _exchanged(model: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    changed = replaced(model, substitute)
    if changed is not model and isinstance(model, RobustClassifier):
        changed.__dict__.pop("forward", None)  # a wrapper (autocast) would call the original
    return changed


def random_stages(model: nn.Module) -> list[RandomResizePad]:
    """The stages of `model` whose output depends on a draw; empty for a deterministic model."""
    return [stage for stage in model.modules() if isinstance(stage, RandomResizePad)]


def set_draw(model: nn.Module, draw: int) -> None:
    """Put the `draw`-th independent draw in force in every random stage of `model`."""
    for stage in random_stages(model):
        stage.draw = draw
