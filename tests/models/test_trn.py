from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robust_submission.models.classifier import RobustClassifier, reveal, undefended
from robust_submission.models.load import load_checkpoint, load_trn, save_trn
from robust_submission.models.surgery import StraightThrough
from robust_submission.models.trn import TRN, DifferentiableTRN

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"width": 8, "depth": 2}
SURROGATE = {"num_classes": 3, "widths": [8], "depth": 1}


def build(**options: object) -> TRN:
    """A TRN far from its start, where it would change nothing."""
    torch.manual_seed(0)
    trn = TRN(**(SMALL | options))  # pyright: ignore[reportArgumentType]
    for weight in trn.parameters():
        nn.init.normal_(weight, std=0.1)
    return trn.eval()


def classifier(trn: TRN | None = None, **options: object) -> RobustClassifier:
    torch.manual_seed(0)
    names = ["cat", "dog", "frog"]
    arguments = {"class_names": names, "backbone": "test_convnext", "image_size": 32} | options
    model = RobustClassifier(**arguments)  # pyright: ignore[reportArgumentType]
    for weight in model.backbone.parameters():
        nn.init.normal_(weight, std=0.2)
    if trn:
        model.attach_trn(trn)
    return model.eval()


def gradient(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images)[:, 0].sum(), images)[0]


CHOICES = [
    {},
    {"streams": "image"},
    {"streams": "gradient"},
    {"fusion": "concatenation"},
    {"estimator": "average", "top_k": 2},
    {"surrogate": SURROGATE},
]


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (28, 28)), (3, (33, 47))])
def test_any_size_and_channels(options: dict[str, object], channels: int, size: tuple[int, int]):
    head = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1))
    classify = nn.Sequential(head, nn.Flatten(), nn.Linear(4, 3))
    images = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1))
    restored = build(channels=channels, **options)(images, classify)
    assert restored.shape == images.shape and restored.min() >= 0 and restored.max() <= 1
    assert not torch.equal(restored, images)


@pytest.mark.parametrize("options", CHOICES)
def test_a_fresh_one_changes_nothing(options: dict[str, object]):
    trn = TRN(**(SMALL | options))  # pyright: ignore[reportArgumentType]
    assert torch.equal(trn(IMAGES, classifier().classify), IMAGES)


def test_each_stream_is_heard():
    trn, maps = build(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    restored = trn.restore(IMAGES, maps)
    assert not torch.equal(restored, trn.restore(IMAGES, -maps))
    deaf = build(streams="image")
    assert deaf.gradient_map(IMAGES, classifier().classify) is None
    assert sum(p.numel() for p in deaf.parameters()) < sum(p.numel() for p in trn.parameters()) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": "none"}, "expected streams of both, image, gradient, received 'none'"),
        ({"fusion": "sum"}, "expected fusion of"),
        ({"estimator": "label"}, "expected estimator of predicted, expected, average"),
        ({"channels": 2}, "expected 1 or 3 channels"),
        ({"depth": 0}, "of at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_the_map_is_of_the_unconcealed_classifier_in_eval_mode():
    trn = build()
    concealed, bare = classifier(trn, conceal=True), classifier(trn, conceal=False)
    assert torch.equal(concealed.restored(IMAGES), bare.restored(IMAGES))
    dropping = classifier(trn, backbone_args={"drop_path_rate": 0.5}).train()
    torch.testing.assert_close(dropping.restored(IMAGES), bare.restored(IMAGES))
    assert all(part.training for part in dropping.backbone.modules())
    assert all(weight.grad is None for weight in dropping.parameters())


def test_the_map_is_made_with_frozen_weights_that_still_learn():
    model, states = classifier(build()), list[bool]()

    def look(*_: object) -> None:
        states.append(any(weight.requires_grad for weight in model.backbone.parameters()))

    model.backbone.register_forward_pre_hook(look)
    model(IMAGES).sum().backward()
    assert states == [False, True]
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("options", CHOICES)
def test_every_view_has_the_same_logits(options: dict[str, object]):
    model = classifier(build(**options))
    expected = model(IMAGES)
    for view in (reveal(model), reveal(model, bypass=True)):
        torch.testing.assert_close(view(IMAGES), expected, atol=1e-5, rtol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(view(IMAGES), expected, atol=1e-5, rtol=1e-4)


def test_revealed_gradients_go_through_the_map():
    """The slope of the logits along a direction, against finite differences."""
    for options in ({}, {"surrogate": SURROGATE}):
        model = classifier(build(**options), conceal=False).double()
        for part in model.modules():  # smooth: no clamp at 0 and 1
            if isinstance(part, TRN):
                nn.init.normal_(part.head.weight, std=0.01)
        images = (0.3 + 0.4 * IMAGES).double()[:1]
        along = torch.randn(images.shape, generator=torch.Generator().manual_seed(3)).double()
        step = 1e-4
        with torch.no_grad():
            rise = (model(images + step * along) - model(images - step * along))[0, 0]
        finite = rise.item() / (2 * step)
        revealed = float((gradient(reveal(model), images) * along).sum())
        constant = float((gradient(model, images) * along).sum())
        assert abs(revealed - finite) < 0.05 * abs(finite)
        assert abs(constant - finite) > 2 * abs(revealed - finite)


def test_bypassed_gradients_are_those_of_the_classifier_at_the_restored_image():
    model = classifier(build())
    restored = model.restored(IMAGES).detach()
    torch.testing.assert_close(
        gradient(reveal(model, bypass=True)), gradient(reveal(classifier()), restored)
    )


def test_views_are_views():
    model = classifier(build())
    assert isinstance(reveal(model).restore, DifferentiableTRN)
    assert isinstance(reveal(model, bypass=True).restore, StraightThrough)
    assert isinstance(model.restore, TRN)
    bare = undefended(model)
    assert torch.equal(bare(IMAGES), classifier(conceal=False)(IMAGES))
    assert reveal(reveal(model)).restore.trn is model.restore  # pyright: ignore[reportAttributeAccessIssue]


def test_saved_alone_or_with_its_classifier(tmp_path: Path):
    trn = build(surrogate=SURROGATE)
    classifier().save_pretrained(tmp_path / "classifier")
    save_trn(trn, tmp_path / "trn")
    assert not list((tmp_path / "trn").glob("*.bin"))
    model = load_checkpoint(tmp_path / "classifier", tmp_path / "trn")
    expected = classifier(trn)(IMAGES)
    assert torch.equal(model(IMAGES), expected)
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(load_checkpoint(tmp_path / "both")(IMAGES), expected)
    assert torch.equal(RobustClassifier.from_pretrained(tmp_path / "both")(IMAGES), expected)


def test_what_does_not_belong_together_is_refused(tmp_path: Path):
    classifier().save_pretrained(tmp_path / "classifier")
    other = build(surrogate=SURROGATE | {"num_classes": 4})
    with pytest.raises(ValueError, match="expected a surrogate of 3 classes, found 4"):
        classifier(other)
    with pytest.raises(ValueError, match=r"of a TRN, among them estimator, found .*backbone"):
        load_trn(tmp_path / "classifier")
    with pytest.raises(ValueError, match="expected the folder of a checkpoint, found none"):
        load_checkpoint(tmp_path / "classifier", tmp_path / "nowhere")


def test_a_network_of_ones_own_is_wrapped_and_not_saved(tmp_path: Path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    model = classifier(build(), backbone=network, mean=(0, 0, 0), std=(1, 1, 1))
    assert model(IMAGES).shape == (4, 3)
    with pytest.raises(ValueError, match="expected a backbone of timm, given by its name"):
        model.save_pretrained(tmp_path)
