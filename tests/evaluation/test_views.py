"""The evaluated model: tried out, and what each attacker sees of it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_submission.evaluation.jobs import Attacker
from robust_submission.evaluation.views import LogProbabilities, Views, build_views, device_of
from robust_submission.models.bpda import BPDA, Through
from robust_submission.models.classifier import RobustClassifier
from robust_submission.models.gcm import GCM
from robust_submission.models.load import LoadedModel
from robust_submission.models.resize_pad import RandomResizePad
from robust_submission.models.surgery import Compiled, StraightThrough
from robust_submission.models.trn import TRN
from robust_submission.settings import EvaluationSettings

OBLIVIOUS, ADAPTIVE, TRANSFER = Attacker.OBLIVIOUS, Attacker.ADAPTIVE, Attacker.TRANSFER
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SETTINGS = EvaluationSettings()
NAMES = ["a", "b", "c"]


def linear(*before: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*before, nn.Flatten(), nn.Linear(192, 3))


def build(model: object, class_names: list[str] | None = None, twin: object = None) -> Views:
    named = LoadedModel(name="it", model=model, image_size=8)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    return build_views(named, twin, IMAGES, class_names or NAMES, cpu, SETTINGS)  # type: ignore[arg-type]


def test_a_plain_model_hides_nothing_and_has_no_twin():
    target = build(linear())
    assert set(target.seen_by) == {OBLIVIOUS, ADAPTIVE} and not target.hides
    assert not (target.random or target.softmax) and target.differentiable


def test_gcm_is_revealed_and_taken_away_for_the_twin():
    target = build(linear(GCM()))
    assert target.hides and not target.random
    assert isinstance(target.seen_by[ADAPTIVE][0], StraightThrough)  # type: ignore[index]
    torch.testing.assert_close(target.seen_by[TRANSFER](IMAGES), linear()(IMAGES))


def test_a_trn_is_revealed_bypassed_and_taken_away_for_the_twin():
    torch.manual_seed(0)
    classifier = RobustClassifier(class_names=NAMES, image_size=8, backbone=linear(), conceal=False)
    alone = build(classifier)
    assert Attacker.ADAPTIVE_BPDA not in alone.seen_by and not alone.hides
    classifier.attach_trn(TRN(width=4, depth=1))
    for weight in classifier.restore.parameters():
        nn.init.normal_(weight, std=0.1)
    target = build(classifier)
    assert target.hides and target.optimises and not alone.optimises
    expected = classifier(IMAGES)
    torch.testing.assert_close(target.seen_by[ADAPTIVE](IMAGES), expected)
    torch.testing.assert_close(target.seen_by[Attacker.ADAPTIVE_BPDA](IMAGES), expected)
    assert not torch.equal(target.seen_by[TRANSFER](IMAGES), expected)


def test_another_twin_is_taken_where_one_is_named():
    twin = linear(nn.AvgPool2d(1))
    assert build(linear(GCM()), twin=twin).seen_by[TRANSFER] is twin
    concealed = build(linear(), twin=linear(GCM())).seen_by[TRANSFER]
    assert isinstance(concealed, nn.Sequential) and isinstance(concealed[0], nn.Identity)
    with pytest.raises(ValueError, match=r"twin: expected one logit .* 2 classes, found 3"):
        build(lambda images: images.flatten(1)[:, :2], NAMES[:2], twin)


def test_resize_and_pad_makes_a_model_random_and_its_draws_are_set():
    target = build(linear(GCM(), RandomResizePad(8, 4)))
    assert target.random and target.hides
    target.set_draw(3)
    third = target.model(IMAGES)
    target.set_draw(4)
    assert not torch.equal(target.model(IMAGES), third)
    target.set_draw(3)
    assert torch.equal(target.seen_by[ADAPTIVE](IMAGES), third)


def test_noise_that_is_not_ours_is_noticed():
    model = linear()
    target = build(lambda images: model(images + 0.1 * torch.rand_like(images)))
    assert target.random
    masked = torch.tensor([0, 0, -torch.inf])
    assert build(lambda images: model(images + 0.1 * torch.rand_like(images)) + masked).random


def test_a_generator_of_its_own_cannot_be_held():
    model, own = linear(), np.random.default_rng(0)
    seeded = build(lambda images: model(images + 0.1 * torch.rand_like(images)))
    unseeded = build(lambda images: model(images + 0.1 * own.random()))
    assert seeded.random and seeded.repeats and unseeded.random and not unseeded.repeats


def test_a_model_that_mixes_images_is_noticed():
    model = linear()

    def noisy_by_place(images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return model(images + 0.1 * torch.rand(images.shape, generator=generator))

    def centred(images: Tensor) -> Tensor:
        return model(images - images.mean(dim=0))

    for mixing in (noisy_by_place, centred):
        target = build(mixing)
        assert target.mixes_images and not target.random and not target.stops_early(ADAPTIVE)
    alone = build(linear(GCM()))
    assert not alone.mixes_images and alone.stops_early(ADAPTIVE)


@pytest.mark.parametrize("centre", [False, True])
def test_a_random_model_that_mixes_images_is_noticed_at_one_draw(centre: bool):
    model, own = linear(), torch.Generator().manual_seed(0)

    def noisy(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = 0.1 * torch.rand(images.shape, generator=generator)
        return model(images + noise - centre * images.mean(dim=0))

    assert build(noisy).mixes_images is centre
    assert build(lambda images: noisy(images, own)).mixes_images is None


def test_small_logits_are_looked_at_as_closely():
    model = linear()

    def centred(images: Tensor) -> Tensor:
        return 1e-6 * model(images - images.mean(dim=0))

    assert build(lambda images: 1e-6 * model(images + 0.1 * torch.rand_like(images))).random
    assert build(centred).mixes_images
    still = build(lambda images: 1e-6 * model(images))
    assert not still.random and not still.mixes_images


def test_a_model_that_writes_into_its_images_gets_copies():
    model = linear()
    writing = lambda images: model(images.sub_(0.5))  # noqa: E731
    target = build(writing, twin=writing)
    torch.testing.assert_close(target.seen_by[TRANSFER](IMAGES), model(IMAGES - 0.5))
    assert target.differentiable and not target.random and not target.mixes_images
    before = IMAGES.clone()
    torch.testing.assert_close(target.model(IMAGES), model(IMAGES - 0.5))
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("script", [torch.jit.script, lambda each: torch.jit.trace(each, IMAGES)])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_is_evaluated(script: Callable[[nn.Module], nn.Module]):
    assert build(script(linear())).differentiable


def test_a_replacement_without_a_gradient_is_none():
    model = linear()

    def listed(images: Tensor) -> Tensor:
        return model(torch.tensor(images.tolist())) + 0 * images.round().sum()

    assert build(listed).found is None


def test_probabilities_are_noticed_and_revealed_as_their_logarithms():
    target = build(linear(), None)
    soft = build(nn.Sequential(linear(), nn.Softmax(dim=1)))
    assert soft.softmax and soft.hides and isinstance(soft.seen_by[ADAPTIVE], LogProbabilities)
    expected = target.model(IMAGES).log_softmax(dim=1)
    torch.testing.assert_close(soft.seen_by[ADAPTIVE](IMAGES), expected)
    assert LogProbabilities(lambda images: torch.zeros(1, 2))(IMAGES).isfinite().all()


def test_every_view_of_a_softmax_model_but_the_oblivious_gives_logits():
    classifier = RobustClassifier(class_names=NAMES, image_size=8, backbone=linear())
    classifier.attach_trn(TRN(width=4, depth=1))  # it changes nothing before it is trained
    soft = nn.Sequential(classifier, nn.Softmax(dim=1))
    own, named = build(soft).seen_by, build(soft, twin=soft).seen_by
    expected = linear()((IMAGES - classifier.normalize.mean) / classifier.normalize.std)
    assert (own[OBLIVIOUS](IMAGES) - expected.softmax(dim=1)).abs().max() < 1e-5
    for view in (own[ADAPTIVE], own[Attacker.ADAPTIVE_BPDA], own[TRANSFER], named[TRANSFER]):
        torch.testing.assert_close(view(IMAGES), expected.log_softmax(dim=1))


def test_a_model_without_gradients_is_noticed():
    assert not build(lambda images: linear()(images.detach()).detach()).differentiable
    assert not build(lambda images: linear()(images.detach())).differentiable
    blind = torch.no_grad()(linear())
    target = build(lambda images: linear()(images), twin=lambda images: blind(images))
    assert target.differentiable and not target.has_gradient(TRANSFER)


def test_evaluation_freezes_the_model():
    model = linear().train()
    build(model)
    assert not model.training and not any(each.requires_grad for each in model.parameters())


def two(images: Tensor) -> tuple[Tensor, Tensor]:
    return images, images


@pytest.mark.parametrize(
    ("model", "class_names", "message"),
    [
        (linear(), ["a", "b"], "it: expected one logit for each of the data's 2 classes, found 3"),
        (nn.Flatten(), NAMES, "classes, found 192"),
        (nn.Linear(5, 3), NAMES, r"it: expected logits of images \(4, 3, 8, 8\), found: .*shapes"),
        (nn.Identity(), NAMES, r"found \(4, 3, 8, 8\)"),
        (two, NAMES, "found tuple"),
        ({}.__getitem__, NAMES, "it: expected logits of images .*, found: "),
        (lambda: None, NAMES, "found: .*positional argument"),
        (lambda images: images.flatten(1)[:, :1], ["a"], r"at least two classes, found \['a'\]"),
    ],
)
def test_a_model_that_does_not_fit_the_data(model: object, class_names: list[str], message: str):
    with pytest.raises(ValueError, match=message) as raised:
        build(model, class_names)
    assert str(raised.value).count("\n") < 3


def test_a_model_may_have_more_classes_than_numbered_data():
    assert build(linear(), ["0", "1"]).num_classes == 3
    with pytest.raises(ValueError, match="the data's 4 classes, found 3"):
        build(linear(), ["0", "1", "2", "3"])


def test_a_function_computes_where_its_weights_are():
    """The device meta takes the place of a GPU."""
    network, other = linear(), torch.device("meta")
    for model, device in ((network.forward, "cpu"), (nn.Flatten().forward, "meta")):
        named = LoadedModel(name="it", model=model, image_size=8, class_names=None)
        assert device_of(named, IMAGES, other) == torch.device(device)


@pytest.mark.parametrize("conceal", [False, True])
def test_compiled_views_share_one_backbone_and_hide_no_more(
    monkeypatch: pytest.MonkeyPatch, conceal: bool
):
    monkeypatch.setattr(torch, "compile", lambda network, mode: network)
    classifier = RobustClassifier(
        class_names=NAMES, image_size=8, backbone=linear(), conceal=conceal
    )
    views = build(classifier)
    guessed = BPDA(classifier, Through.OPERATIONS)
    views = replace(views, seen_by={**views.seen_by, Attacker.ADAPTIVE_BPDA: guessed})
    compiled = views.compiled(None)
    assert compiled.seen_by.pop(Attacker.ADAPTIVE_BPDA) is guessed  # type: ignore[attr-defined]
    every = [compiled.model, *compiled.seen_by.values()]
    (backbone,) = {each.backbone for each in every}  # type: ignore[attr-defined]
    assert isinstance(backbone, Compiled) and isinstance(classifier.backbone, nn.Sequential)
    assert backbone.network[-1] is classifier.backbone[-1]  # type: ignore[index]
    assert (compiled.seen_by[ADAPTIVE] is compiled.model) == (not conceal)
    torch.testing.assert_close(compiled.seen_by[ADAPTIVE](IMAGES), classifier(IMAGES))
