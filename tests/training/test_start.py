"""What a run starts from, what the rules allow of it, and epochs that train the head alone."""

import pickle
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from robust_submission.cli.errors import UserError, log_once
from robust_submission.models import weights
from robust_submission.models.load import load_checkpoint
from robust_submission.training.recipe import (
    DataConfig,
    ExtraConfig,
    ModelConfig,
    Recipe,
    RulesConfig,
    TRNRecipe,
)
from robust_submission.training.start import build_classifier, require_allowed
from tests.conftest import run_command
from tests.training.test_resume import ADVERSARIAL, assert_same_run, described, run_all

NAMES = ["a", "b", "c"]
BACKBONE = ModelConfig(backbone="test_convnext")


def saved(path: Path, num_classes: int, name: str = "test_convnext") -> Path:
    """A file of timm's own network, with other weights than those of any seed here."""
    torch.manual_seed(7)
    save_file(timm.create_model(name, num_classes=num_classes).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def every_line() -> None:
    log_once.cache_clear()


@pytest.mark.parametrize(
    ("num_classes", "said"),
    [(3, ""), (7, "weights for 7 classes; a head for 3 is drawn"), (0, "weights for no classes")],
)
@pytest.mark.parametrize("published", [False, True])
def test_a_backbone_keeps_its_weights_and_gets_a_head_of_its_own(
    num_classes: int,
    said: str,
    published: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    path = saved(tmp_path / "a.safetensors", num_classes)
    recipe, asked = Recipe(model=BACKBONE, checkpoint=path), list[tuple[object, ...]]()
    if published:
        monkeypatch.setattr(
            weights, "hf_hub_download", lambda *what, **_: asked.append(what) or path
        )
        recipe = Recipe(model=ModelConfig(backbone="test_convnext", pretrained=True))
    model, new = (build_classifier(each, NAMES) for each in (recipe, Recipe(model=BACKBONE)))
    file, fresh = load_file(path), new.backbone.state_dict()
    for name, tensor in model.backbone.state_dict().items():
        of_head = name.startswith("head.fc.") and num_classes != 3
        assert torch.equal(tensor, fresh[name] if of_head else file[name]), name
    lines = [each for each in caplog.messages if "classes" in each]
    assert len(lines) == bool(said) and said in "".join(lines)
    lines = [each for each in caplog.messages if each.startswith("model.")]
    if published:
        assert asked == [("timm/test_convnext.r160_in1k", "model.safetensors")]
        trained = "the weights of test_convnext were trained with (0.5, 0.5, 0.5), this run has "
        assert lines[0] == f"model.mean: {trained}(0.485, 0.456, 0.406)."
    assert len(lines) == 2 * published


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 2}, r"expected stem\.0\.weight of shape \(24, 3, 2, 2\), found \(24, 3, 4"),
        ({"use_grn": True}, "expected the tensor stages.0.blocks.0.mlp.grn.weight, found none"),
        (
            {"conv_bias": False},
            "expected the model's tensors alone, found .* more: stages.0.blocks",
        ),
    ],
)
def test_a_file_of_another_network_is_refused(
    arguments: dict[str, object], message: str, tmp_path: Path
):
    path = saved(tmp_path / "a.safetensors", 3)
    recipe = Recipe(
        model=ModelConfig(backbone="test_convnext", backbone_args=arguments), checkpoint=path
    )
    with pytest.raises(UserError, match=rf"a\.safetensors: {message}"):
        build_classifier(recipe, NAMES)


@pytest.mark.parametrize("backbone", ["test_convnext", "repvit_m0_9"])  # with norms in its head
def test_a_run_s_head_follows_the_order_of_the_classes(
    backbone: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Another order gives the same class for each image; another normalisation is said."""
    plain = ModelConfig(backbone=backbone, image_size=32)
    build_classifier(Recipe(model=plain, seed=3), ["b", "c", "a"]).save_pretrained(tmp_path)
    model = replace(plain, mean=(0.5, 0.5, 0.5))
    later = build_classifier(Recipe(model=model, checkpoint=tmp_path), NAMES).eval()
    former = load_checkpoint(tmp_path)
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(
        later.backbone(image)[:, [NAMES.index(each) for each in "bca"]], former.backbone(image)
    )
    assert "model.mean" in caplog.text and "this run has (0.5, 0.5, 0.5)" in caplog.text
    others = build_classifier(Recipe(model=plain, checkpoint=tmp_path), ["a", "b", "d"])
    new = build_classifier(Recipe(model=plain), NAMES)
    heads = [weights.head_of(each.backbone).state_dict() for each in (others, new)]
    torch.testing.assert_close(*heads, rtol=0, atol=0)
    assert "the classes are others; a head for 3 is drawn from the seed" in caplog.text


def test_what_timm_says_of_a_file_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = saved(tmp_path / "model.safetensors", 3)
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"std": [0.5, 0.5, 0.5]}}')
    build_classifier(Recipe(model=BACKBONE, checkpoint=path), NAMES)
    (line,) = caplog.messages
    assert line.startswith(f"model.std: the weights in {path} were trained with (0.5, 0.5, 0.5), ")


def test_a_head_of_other_features_and_a_pickle_are_refused(tmp_path: Path):
    file = load_file(saved(tmp_path / "a.safetensors", 7))
    path = tmp_path / "b.safetensors"
    save_file(file | {"head.fc.weight": torch.zeros(7, 5)}, path)
    recipe = Recipe(model=BACKBONE, checkpoint=path)
    with pytest.raises(UserError, match=r"head\.fc\.weight of shape \(3, 64\), found \(7, 5\)"):
        build_classifier(recipe, NAMES)
    path.write_bytes(pickle.dumps(file))
    with pytest.raises(UserError, match="expected a safetensors file, found other bytes"):
        build_classifier(recipe, NAMES)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("test_convnext", "timm/test_convnext.* on the Hugging Face Hub .* found no network$"),
        ("gcvit_tiny", r"as safetensors .* found none but https://.*\.pth, a pickle, which is not"),
        ("convnext_zepto", "in timm, found none"),
    ],
)
def test_weights_that_are_not_to_be_had_are_named(
    name: str, found: str, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object, **__: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(weights, "hf_hub_download", fails)
    with pytest.raises(
        UserError, match=f"model.pretrained: expected weights of {name},? .*{found}"
    ):
        weights.published_weights(name)


RUNS = {
    "new": {"checkpoint": None},
    "published": {"model": {"pretrained": True}},
    "from_file": {"checkpoint": "net.safetensors"},
    "second": {"checkpoint": "new"},
    "indirect": {"checkpoint": "published"},
    "ruled": {"checkpoint": "gone", "rules": {"pretrained": False}},
    "circle": {"checkpoint": "circle"},
    "of_a_function": {"model": "package.module:function"},
    "taught": {"checkpoint": "new", "data": {"extra": {"teacher": "published"}}},
    "restored": {"trn": "published"},
    "restorer": {"checkpoint": "new", "trn": {"start": "published", "width": 8}},
    "diamond": {"checkpoint": "second", "data": {"extra": {"teacher": "new"}}},
}


@pytest.mark.parametrize(
    ("start", "fault"),
    [
        (None, ""),
        ("new", ""),
        ("second", ""),
        ("ruled", ""),
        ("diamond", ""),
        ("taught", "found the checkpoint published, which itself"),
        ("restored", "found the checkpoint published, which itself"),
        ("restorer", "found the checkpoint published, which itself"),
        ("net.safetensors", "found the checkpoint net.safetensors"),
        ("published", "found the checkpoint published, which itself"),
        ("indirect", "found the checkpoint published, which itself"),
        ("from_file", "found the checkpoint net.safetensors"),
        ("circle", "found the checkpoint circle, whose own start is not known"),
        ("of_a_function", "found the checkpoint of_a_function, which itself"),
        (
            "gone",
            "recipe.yaml: expected the recipe of the run, which says how it began, found",
        ),
    ],
)
def test_rules_forbid_what_was_trained_elsewhere(
    start: str | None, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name, recipe in RUNS.items():
        Path(name).mkdir()
        Path(name, "recipe.yaml").write_text(yaml.safe_dump(recipe))
    checkpoint = None if start is None else Path(start)
    require_allowed(Recipe(checkpoint=checkpoint))
    rules, extra = RulesConfig(pretrained=False), ExtraConfig(root=Path("x"), teacher=checkpoint)
    for recipe in (
        Recipe(checkpoint=checkpoint, rules=rules),
        Recipe(trn=checkpoint, rules=rules),
        Recipe(data=DataConfig(extra=extra), rules=rules),
        *([TRNRecipe(checkpoint=checkpoint, rules=rules)] if checkpoint else []),
    ):
        with pytest.raises(UserError, match=fault) if fault else nullcontext():
            require_allowed(recipe)
    with pytest.raises(UserError, match=r"found the model a\.py:classifier"):
        require_allowed(TRNRecipe(model="a.py:classifier", rules=rules))


# 5 steps an epoch: the first with the head alone, the second with everything.
FREEZING = (
    *(*ADVERSARIAL, "--ema_decay", "0.9", "--gradient_accumulation", "2"),
    *("--model.freeze_epochs", "1", "--model.backbone"),
)


def test_the_head_alone_is_trained_at_first_and_a_killed_run_goes_on(
    few_digits: Path, tmp_path: Path
):
    """The backbone has batch norm; to go on, the file is not needed."""
    path = saved(tmp_path / "a.safetensors", 7, "test_resnet")
    options = (*FREEZING, "test_resnet", "--checkpoint", str(path), "--data.root", few_digits)
    whole, output, kill = tmp_path / "whole", tmp_path / "run", {"at": "step", "signal": 9}
    first, done = run_all(
        described(whole, options),
        described(output, options, "--save_steps", "1", count=4, **kill),
    )
    assert first == [0, -signal.SIGKILL], done.stderr
    file = load_file(path)
    path.unlink()
    statuses, done = run_all(
        described(output, options, "--resume", "--save_steps", "1", count=5, **kill),
        described(output, options, "--resume"),
    )
    assert statuses == [-signal.SIGKILL, 0], done.stderr
    assert_same_run(whole, output)
    for part in ("model", "ema"):
        frozen, end = (
            load_file(whole / f"state/epoch-000{epoch}/{part}.safetensors") for epoch in (1, 2)
        )
        for name, tensor in file.items():
            own = frozen[f"backbone.{name}"]
            assert torch.equal(own, tensor) != name.startswith("fc."), (part, name)
            assert not torch.equal(own, end[f"backbone.{name}"]), (part, name)


def test_two_processes_train_a_head_as_one_does(few_digits: Path, tmp_path: Path):
    path = saved(tmp_path / "a.safetensors", 7)
    options = (*FREEZING, "test_convnext", "--checkpoint", path, "--data.root", few_digits)
    options = (*options, "--objective.awp_gamma", "0")  # each part has a perturbation of its own
    tables, ends = [], []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        done = run_command("training/train.py", "--output", output, *options, processes=processes)
        assert done.returncode == 0, done.stderr
        tables.append(pd.read_csv(output / "metrics.csv"))
        ends.append(load_file(output / "state/epoch-0001/model.safetensors"))
    np.testing.assert_allclose(*tables, rtol=2e-5)
    for name, tensor in ends[0].items():
        np.testing.assert_allclose(tensor, ends[1][name], atol=1e-5, err_msg=name)
        file = load_file(path)[name.removeprefix("backbone.")]
        assert torch.equal(ends[1][name], file) != ("head.fc" in name)
