import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import (
    RobustClassifier,
    random_stages,
    reveal,
    set_draw,
    undefended,
)
from robust_submission.models.gcm import GCM
from robust_submission.models.load import load_checkpoint
from robust_submission.models.surgery import StraightThrough

NAMES = ["cat", "dog", "frog"]
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(**options: object) -> RobustClassifier:
    torch.manual_seed(0)
    arguments = {"backbone": "test_convnext", "image_size": 32, "class_names": NAMES} | options
    return RobustClassifier(**arguments).eval()  # type: ignore[arg-type]


def input_gradient(model: torch.nn.Module) -> torch.Tensor:
    images = IMAGES.clone().requires_grad_()
    return torch.autograd.grad(model(images).logsumexp(1).sum(), images)[0]


def test_stages_stand_in_order():
    stages = [name for name, _ in build().named_children()]
    assert stages == ["restore", "conceal", "randomize", "normalize", "backbone"]


def test_logits_with_and_without_gcm_agree():
    with_gcm, without = build(conceal=True), build(conceal=False)
    assert with_gcm(IMAGES).shape == (4, 3)
    torch.testing.assert_close(with_gcm(IMAGES), without(IMAGES), atol=1e-5, rtol=0)


def test_convnext_tiny_is_the_default():
    model = RobustClassifier(class_names=[str(i) for i in range(10)])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 27.8
    assert len(model.conceal.state_dict()) == 0


def test_reveal_has_the_logits_of_gcm_and_the_gradients_without_it():
    concealed, bare = build(conceal=True), build(conceal=False)
    revealed = reveal(concealed)
    assert torch.equal(revealed(IMAGES), concealed(IMAGES))
    torch.testing.assert_close(input_gradient(revealed), input_gradient(bare), atol=1e-6, rtol=1e-4)
    assert input_gradient(concealed).abs().max() > 1e6 * input_gradient(bare).abs().max()


def test_reveal_shares_parameters_and_leaves_the_model_as_it_was():
    model = build()
    stage = model.conceal
    revealed = reveal(model)
    assert model.conceal is stage and revealed is not model
    assert all(a is b for a, b in zip(model.parameters(), revealed.parameters(), strict=True))
    assert reveal(build(conceal=False)).conceal.__class__ is torch.nn.Identity


def test_reveal_sees_through_a_wrapped_forward():
    model = build()
    expected = input_gradient(reveal(model))
    inner = model.forward
    model.forward = lambda images: inner(images)
    assert torch.equal(input_gradient(reveal(model)), expected)


def test_reveal_returns_a_stranger():
    stranger = torch.nn.Linear(2, 2)
    assert reveal(stranger) is stranger


def test_reveal_finds_gcm_at_any_depth_of_a_stranger():
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(GCM(), GCM()))
    stranger = torch.nn.Sequential(GCM(), torch.nn.Sequential(body), torch.nn.Flatten())
    stages = (stranger[0], body[1][0], body[1][1])
    before = list(stranger.modules())
    revealed = reveal(stranger)
    assert torch.equal(revealed(IMAGES), stranger(IMAGES))
    found = [each for each in revealed.modules() if isinstance(each, StraightThrough)]
    assert all(a.stage is b for a, b in zip(found, stages, strict=True))
    assert all(a is b for a, b in zip(before, stranger.modules(), strict=True))
    assert revealed[1][0][0] is body[0] and revealed[2] is stranger[2]  # type: ignore[index]
    assert reveal(revealed) is revealed


def test_the_undefended_twin_has_the_weights_and_no_defence():
    bare = build(conceal=False)
    twin = undefended(build(conceal=True, randomize={"min_size": 26}))
    assert torch.equal(twin(IMAGES), bare(IMAGES))
    assert torch.equal(input_gradient(twin), input_gradient(bare))
    assert undefended(bare) is bare


def test_randomness_is_set_by_the_draw():
    model = build(randomize={"min_size": 26})
    assert len(random_stages(model)) == 1 and not random_stages(build())
    first = model(IMAGES)
    set_draw(reveal(model), 1)
    assert not torch.equal(model(IMAGES), first)
    set_draw(model, 0)
    assert torch.equal(model(IMAGES), first)


def test_checkpoint_rebuilds_the_model(tmp_path: Path):
    model = build(randomize={"min_size": 26, "seed": 3}, mean=[0.5] * 3, std=[0.25] * 3)
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert not loaded.training and loaded.class_names == NAMES
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}


def damage(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> None:
    build().save_pretrained(folder)
    weights = folder / "model.safetensors"
    changed = load_file(weights) | (tensors or {})
    save_file({name: tensor for name, tensor in changed.items() if tensor.numel()}, weights)
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"backbone.head.fc.bias": torch.empty(0)}, {}, r"expected the tensor backbone\.head"),
        ({"extra": torch.ones(1)}, {}, "found 1 more: extra"),
        ({}, {"class_names": ["a", "b"]}, r"of shape \(2, .*found \(3, "),
        ({}, {"colour": "red"}, "colour"),
        ({}, {"backbone": "convnxt_tiny"}, "nearest known: convnext_tiny"),
        ({}, {"backbone_args": {"patchsize": 4}}, "patchsize"),
        ({}, {"class_names": []}, "class_names: expected list should have at least 1 item"),
        ({}, {"class_names": 10}, "config.json: class_names: expected a valid list, found 10"),
        ({}, {"class_names": [["a"]]}, "class_names.0: expected a valid string, found "),
        ({}, {"randomize": {"minsize": 27}}, "randomize.min_size: expected this key, found none"),
        ({}, {"randomize": {"min_size": 32}}, "config.json: RandomResizePad: expected 1 <= min_"),
        ({}, {"randomize": {"min_size": 27.5}}, "randomize.min_size: expected a valid integer"),
        ({}, {"backbone_args": {"depths": [1]}}, "config.json: backbone_args: expected those of"),
        ({}, {"backbone_args": {"depths": [1, 1, 10**9, 1]}}, "at most 200 as depths, found "),
        ({}, {"backbone_args": {"drop_rate": float("nan")}}, "at most 10,000 as drop_rate"),
        ({}, {"image_size": 0}, "image_size: expected greater than or equal to 1, found 0"),
        ({}, {"image_size": "32"}, "image_size: expected a valid integer, found '32'"),
        ({}, {"image_size": 32.5}, "image_size: expected a valid integer, found 32.5"),
        ({}, {"image_size": None}, "image_size: expected a valid integer, found None"),
        ({}, {"image_size": True}, "image_size: expected a valid integer, found True"),
        ({}, {"image_size": 10**9}, "image_size: expected less than or equal to 8192"),
        ({}, {"mean": [0.5, 0.5]}, "mean.2: expected this key, found none"),
        ({}, {"std": [1, 1, 0]}, "std.2: expected greater than 0, found 0"),
        ({}, {"std": [1, 1, float("inf")]}, "std.2: expected a finite number, found inf"),
        ({}, {"conceal": None}, "conceal: expected a valid boolean, found None"),
        ({}, {"restore": {"depth": 100_000}}, "restore.depth: expected less than or equal to 200"),
        ({}, {"restore": {"surrogate": {}}}, "restore.surrogate.num_classes: expected this key"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, object], message: str
):
    damage(tmp_path, tensors, **config)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


def test_a_pickle_is_refused_unread(tmp_path: Path):
    build().save_pretrained(tmp_path)
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    assert pickle.dumps(1) and bomb.startswith(b"cos")
    (tmp_path / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="expected a safetensors file, found other bytes"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
        *("pretrained_strict", "cache_dir", "device", "dtype", "features_only", "scriptable"),
    ],
)
def test_a_backbone_is_shaped_and_no_more(tmp_path: Path, name: str):
    """timm would load the pickle that checkpoint_path names, and only its default spares it."""
    message = f"backbone_args: expected arguments that shape the network, not {name}, found "
    for arguments in ({name: "x.pth"}, {"norm_kwargs": {name: 1}}):
        with pytest.raises(UserError, match=f"^{message}"):
            build(backbone_args=arguments)
    config = {"class_names": NAMES, "backbone": "test_convnext", "backbone_args": {name: True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_checkpoint, RobustClassifier.from_pretrained):
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_missing_parts_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="expected the folder of a checkpoint"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match=r"config\.json: expected the arguments .* nothing there"):
        load_checkpoint(tmp_path)
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected a safetensors file, found nothing there"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected the arguments of a RobustClassifier in JSON"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="among them class_names, found list"):
        load_checkpoint(tmp_path)
