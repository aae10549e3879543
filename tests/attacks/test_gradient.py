"""The gradient loop: closed forms, relations between attacks, and what it must leave alone."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_submission.attacks import ATTACKS, NORMS, PGD, build_attack, image_seeds
from robust_submission.attacks.losses import LOSSES
from robust_submission.attacks.pgd import BIM, FFGSM, FGSM, MIM, UniformNoise, input_gradient

BUDGETS = {"linf": 0.15, "l2": 0.8, "l1": 8.0, "l1-dense": 8.0}
GRADIENT = ["fgsm", "ffgsm", "bim", "mim", "pgd"]


class Linear(nn.Module):
    """A linear binary classifier: logits (0, w . x)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = (images * self.weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.fixture
def linear() -> Linear:
    return Linear(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(3)))


def optimum(weight: torch.Tensor, norm: str) -> torch.Tensor:
    """The perturbation of size one that raises w . x most."""
    if norm == "linf":
        return weight.sign()
    if norm == "l2":
        return weight / weight.norm()
    best = weight.abs().argmax()
    return torch.zeros(48).index_put((best,), weight.flatten()[best].sign()).view(3, 4, 4)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("targeted", [False, True])
def test_finds_the_optimum_of_a_linear_model(linear, norm, name, targeted):
    images = torch.full((4, 3, 4, 4), 0.5)  # epsilon 0.1: the walls are never met
    labels = torch.tensor([0, 0, 1, 1])
    attack = build_attack(name, 0.1, norm, targeted=targeted)
    found = attack(linear, images, labels) - images
    toward = torch.where(labels == 0, 1, -1) * (-1 if targeted else 1)
    expected = 0.1 * toward.view(-1, 1, 1, 1) * optimum(linear.weight.detach(), norm)
    if name in ("bim", "mim", "fgsm") or (norm == "linf" and name == "pgd"):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    else:  # a random start is corrected only as far as the steps reach
        gain = (found * linear.weight).flatten(1).sum(1) * toward
        best = (expected * linear.weight).flatten(1).sum(1) * toward
        assert (gain <= best * (1 + 1e-5)).all()
        assert (gain >= best * (0.95 if name == "pgd" else 0.6)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [*GRADIENT, "noise"])
@settings(max_examples=10, deadline=None)
@given(epsilon=st.floats(1e-4, 20), seed=st.integers(0, 2**31))
def test_stays_inside_ball_and_box(digits, norm, name, epsilon, seed):
    images = digits.images[:6]
    images = images + 0.3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    images = images.clamp(0, 1)
    attack = build_attack(name, epsilon, norm)
    found = attack(digits.model, images, digits.labels[:6], torch.Generator().manual_seed(seed))
    assert found.shape == images.shape and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1
    size = NORMS[norm].size(found.double() - images.double())
    rounding = 6e-8 * (192 if norm.startswith("l1") else 14)  # a float32 pixel's; 14 = sqrt(192)
    assert (size <= epsilon * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("name", list(ATTACKS))
def test_epsilon_0_gives_the_same_bytes_in_a_new_tensor(digits, name):
    found = build_attack(name, 0)(digits.model, digits.images, digits.labels)
    assert found.numpy().tobytes() == digits.images.numpy().tobytes()
    assert found.data_ptr() != digits.images.data_ptr()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", GRADIENT)
def test_raises_every_loss_and_lowers_accuracy(digits, accuracy, losses, norm, name):
    found = build_attack(name, BUDGETS[norm], norm)(digits.model, digits.images, digits.labels)
    # A saturated loss of 0 can only stay; a step as long as the ball overshoots on a few.
    rose = losses(found) > losses(digits.images)
    single = name in ("fgsm", "ffgsm")
    assert rose.float().mean() >= (0.9 if single else 0.99)
    assert losses(found).mean() > (2 if single else 3) * losses(digits.images).mean()
    assert accuracy(found) < accuracy(digits.images) - 0.05


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_raises_its_own_loss(digits, norm, loss):
    attack = PGD(norm=norm, epsilon=BUDGETS[norm] / 20, loss=loss, random_start=False)
    found = attack(digits.model, digits.images, digits.labels)
    with torch.no_grad():
        before, after = (
            LOSSES[loss](digits.model(images), digits.labels) for images in (digits.images, found)
        )
    assert (after > before).float().mean() >= 0.98


def test_losses_against_numpy():
    logits = np.random.default_rng(0).normal(size=(6, 5))
    labels = np.array([0, 1, 2, 3, 4, 0])
    own = logits[np.arange(6), labels]
    others = np.where(np.eye(5)[labels] == 1, -np.inf, logits).max(axis=1)
    ordered = np.sort(logits, axis=1)
    expected = {
        "ce": np.log(np.exp(logits).sum(axis=1)) - own,
        "margin": others - own,
        "dlr": -(own - others) / (ordered[:, -1] - ordered[:, -3]),
    }
    for name, loss in LOSSES.items():
        found = loss(torch.tensor(logits), torch.tensor(labels))
        np.testing.assert_allclose(found, expected[name], rtol=1e-9)


def test_dlr_needs_three_classes(linear):
    with pytest.raises(ValueError, match="at least 3 classes"):
        PGD(loss="dlr")(linear, torch.rand(1, 3, 4, 4), torch.tensor([0]))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_targeted_reaches_its_target(digits, norm):
    targets = (digits.labels + 1) % 10
    attack = PGD(norm=norm, epsilon=4 * BUDGETS[norm], steps=20, targeted=True)
    found = attack(digits.model, digits.images, targets)
    with torch.no_grad():
        hit = digits.model(found).argmax(1) == targets
        before = (digits.model(digits.images).argmax(1) == targets).float().mean()
    assert before < 0.05 and hit.float().mean() > 0.8


def test_relations_between_the_attacks(digits):
    model, images, labels = digits
    epsilon = 0.1
    pairs = [
        (
            FGSM(epsilon=epsilon),
            PGD(epsilon=epsilon, steps=1, step_size=epsilon, random_start=False),
        ),
        (FFGSM(epsilon=epsilon), PGD(epsilon=epsilon, steps=1, step_size=1.25 * epsilon)),
        (
            BIM(epsilon=epsilon, steps=7, step_size=0.02),
            PGD(epsilon=epsilon, steps=7, step_size=0.02, random_start=False),
        ),
        (MIM(epsilon=epsilon, decay=0), BIM(epsilon=epsilon)),
        (PGD(epsilon=epsilon, steps=5), PGD(epsilon=epsilon, steps=5, step_size=epsilon / 2)),
    ]
    for attack, twin in pairs:
        assert torch.equal(attack(model, images, labels), twin(model, images, labels))
    assert not torch.equal(
        MIM(epsilon=epsilon)(model, images, labels), BIM(epsilon=epsilon)(model, images, labels)
    )


def test_mim_against_its_definition(digits):
    model, images, labels = digits
    points, velocity = images.clone(), torch.zeros_like(images)
    for _ in range(4):
        points.requires_grad_()
        loss = nn.functional.cross_entropy(model(points), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, points)
        velocity = 0.9 * velocity + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        points = (points + 0.02 * velocity.sign()).detach()
        points = torch.min(torch.max(points, images - 0.05), images + 0.05).clamp(0, 1)
    attack = MIM(epsilon=0.05, step_size=0.02, steps=4, decay=0.9)
    torch.testing.assert_close(attack(model, images, labels), points, atol=1e-6, rtol=0)


class Dropping(nn.Module):
    """Counts its calls; has everything that an attack could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(48, 8)
        self.free = nn.Linear(8, 3)
        self.frozen.requires_grad_(False)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.free(self.frozen(images.flatten(1)).relu())


@pytest.mark.parametrize("name", list(ATTACKS))
def test_leaves_everything_as_found(name):
    model = Dropping()
    model.free.eval()
    model.free.weight.grad = torch.full_like(model.free.weight, 7)
    images = torch.rand(4, 3, 4, 4)
    labels = model(images).argmax(1)
    before = images.clone()
    images.requires_grad_()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    quick = {"steps": 2} if name == "cw" else {}
    options = {"queries": 10} if name in ("autoattack", "square") else quick
    norm = "l2" if name in ("cw", "square") else "linf"
    if name == "square":  # its squares need five pixels
        images = torch.rand(4, 3, 10, 10)
        model.frozen = nn.Linear(300, 8).requires_grad_(False)
        torch.set_rng_state(state)
        before, labels = images.clone(), model(images).argmax(1)
    found = build_attack(name, 0.1, norm, **options)(model, images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.frozen.training and not model.free.training
    assert not model.frozen.weight.requires_grad and model.free.weight.requires_grad
    assert torch.equal(model.free.weight.grad, torch.full_like(model.free.weight, 7))
    assert model.free.bias.grad is None and images.grad is None
    assert torch.equal(images, before)
    assert not found.requires_grad and found.grad_fn is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [*GRADIENT, "noise", "apgd-ce", "cw"])
def test_works_where_the_caller_records_no_gradients(digits, caller, name):
    options = {"steps": 5} if name == "cw" else {}
    attack = build_attack(name, 0.1, "l2" if name == "cw" else None, **options)
    expected = attack(digits.model, digits.images[:8], digits.labels[:8])
    with caller():
        images = digits.images[:8].clone()  # under inference mode an inference tensor
        found = attack(digits.model, images, digits.labels[:8].clone())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [*GRADIENT, "noise", "apgd-ce", "cw"])
def test_works_under_autocast(digits, accuracy, name):
    norm, epsilon = ("l2", 1.0) if name == "cw" else ("linf", 0.15)
    attack = build_attack(name, epsilon, norm, **({"steps": 20} if name == "cw" else {}))
    with torch.autocast("cpu", torch.bfloat16):
        assert digits.model(digits.images[:1]).dtype == torch.bfloat16
        found = attack(digits.model, digits.images, digits.labels)
        low = accuracy(found)  # in the precision that was attacked: C&W goes to the very edge
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert (NORMS[norm].size(found - digits.images) <= epsilon * (1 + 1e-5)).all()
    plain = attack(digits.model, digits.images, digits.labels)
    assert abs(low - accuracy(plain)) < 0.05


def test_a_confident_image_has_a_gradient_in_float16():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    nn.init.uniform_(network[1].weight, 0.01, 0.02)
    nn.init.constant_(network[1].bias, 0)
    with torch.no_grad():
        network[1].weight[1] *= -1
        network[1].bias[1] = -15  # a loss of 2e-7, which float16 cannot tell times a weight from 0
    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.int64)
    expected, _ = input_gradient(network, images, labels, LOSSES["ce"])
    with torch.autocast("cpu", torch.float16):
        found, _ = input_gradient(network, images, labels, LOSSES["ce"])
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


def test_a_gradient_of_nan_or_infinity_moves_no_image_out_of_the_ball(digits):
    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images):
            return images.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient[:, 0], gradient[:, 1, ::2] = torch.nan, torch.inf
            return gradient

    for norm in NORMS:
        found = PGD(norm=norm, epsilon=0.5)(
            lambda images: digits.model(Poisoned.apply(images)), digits.images, digits.labels
        )
        assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1
        assert (NORMS[norm].size(found - digits.images) <= 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("early_stop", [False, True])
def test_seeds_make_an_image_independent_of_its_batch(digits, norm, early_stop):
    precise = copy.deepcopy(digits.model).double()

    def model(images):
        # Rounding in float32 differs by the batch, and much where the loss is small.
        return precise(images.double())

    attack = PGD(norm=norm, epsilon=BUDGETS[norm], steps=3, restarts=2, early_stop=early_stop)
    seeds = image_seeds(0, range(100))
    whole = attack(model, digits.images, digits.labels, seeds=seeds)
    rows = torch.tensor([50, 3, 99, 8, 4])
    part = attack(model, digits.images[rows], digits.labels[rows], seeds=seeds[rows])
    torch.testing.assert_close(part, whole[rows], atol=1e-6, rtol=0)
    other = attack(model, digits.images, digits.labels, seeds=image_seeds(1, range(100)))
    assert (other != whole).flatten(1).any(1).float().mean() > 0.5


def test_noise_of_an_image_is_bitwise_the_same_in_any_batch(digits):
    seeds = image_seeds(3, range(100))
    for norm in NORMS:
        attack = UniformNoise(norm=norm, epsilon=0.3)
        whole = attack(digits.model, digits.images, digits.labels, seeds=seeds)
        single = attack(digits.model, digits.images[7:8], digits.labels[7:8], seeds=seeds[7:8])
        assert torch.equal(whole[7], single[0])


def test_a_generator_is_used_and_moved_on(digits):
    attack = FFGSM(epsilon=0.1)
    generator = torch.Generator().manual_seed(1)
    first, second = (
        attack(digits.model, digits.images, digits.labels, generator) for _ in range(2)
    )
    assert not torch.equal(first, second)
    again = attack(digits.model, digits.images, digits.labels, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    own = [attack(digits.model, digits.images, digits.labels) for _ in range(2)]
    assert torch.equal(*own)
    other = replace(attack, seed=1)(digits.model, digits.images, digits.labels)
    assert torch.equal(other, first)


def fooled(digits, images):
    with torch.no_grad():
        return digits.model(images).argmax(1) != digits.labels


@pytest.mark.parametrize("name", ["fgsm", "ffgsm", "bim", "mim", "pgd"])
def test_early_stop_keeps_every_success_and_returns_the_first(digits, name):
    plain = build_attack(name, 0.08)
    early = replace(plain, early_stop=True)
    seeds = image_seeds(0, range(100))
    last = plain(digits.model, digits.images, digits.labels, seeds=seeds)
    first = early(digits.model, digits.images, digits.labels, seeds=seeds)
    assert not (fooled(digits, last) & ~fooled(digits, first)).any()
    stands = ~fooled(digits, first)
    torch.testing.assert_close(first[stands], last[stands], atol=1e-6, rtol=0)
    if not plain.random_start:  # an image that is wrong already needs no step
        wrong = fooled(digits, digits.images)
        assert wrong.any() and torch.equal(first[wrong], digits.images[wrong])


def test_early_stop_finds_exactly_the_images_fooled_anywhere_on_the_way(digits):
    epsilon, step_size = 0.08, 0.02
    anywhere = fooled(digits, digits.images)
    first = digits.images.clone()
    for steps in range(1, 9):  # BIM has no randomness: its prefix is the shorter attack
        attack = BIM(epsilon=epsilon, step_size=step_size, steps=steps)
        points = attack(digits.model, digits.images, digits.labels)
        new = fooled(digits, points) & ~anywhere
        first[new] = points[new]
        anywhere |= new
    early = replace(attack, early_stop=True)(digits.model, digits.images, digits.labels)
    assert torch.equal(fooled(digits, early), anywhere)
    torch.testing.assert_close(early[anywhere], first[anywhere], atol=1e-6, rtol=0)


def test_early_stop_saves_the_model_work(digits):
    seen = []

    def counting(images):
        seen.append(len(images))
        return digits.model(images)

    BIM(epsilon=0.3, steps=10, early_stop=True)(counting, digits.images, digits.labels)
    assert seen[0] == 100 and seen == sorted(seen, reverse=True) and seen[-1] < 50
    assert all(size == 100 or size % 8 == 0 for size in seen)  # few sizes of batch
    seen.clear()
    BIM(epsilon=0.3, steps=10)(counting, digits.images, digits.labels)
    assert seen == [100] * 10  # and not one forward pass more


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_more_restarts_never_hurt(digits, losses, early_stop, loss):
    seeds = image_seeds(0, range(100))
    before = None
    for restarts in (2, 3, 5):
        attack = PGD(epsilon=0.05, steps=2, restarts=restarts, early_stop=early_stop, loss=loss)
        found = attack(digits.model, digits.images, digits.labels, seeds=seeds)
        if before is not None:
            assert not (fooled(digits, before) & ~fooled(digits, found)).any()
            both = fooled(digits, before) == fooled(digits, found)
            with torch.no_grad():
                old, new = (
                    LOSSES[loss](digits.model(each), digits.labels)[both]
                    for each in (before, found)
                )
            assert (new >= old - 1e-4).all()
        before = found


def test_more_steps_never_hurt_with_early_stop(digits):
    before = torch.zeros(100, dtype=torch.bool)
    for steps in (1, 2, 4, 8, 16):
        attack = BIM(epsilon=0.08, step_size=0.01, steps=steps, early_stop=True)
        now = fooled(digits, attack(digits.model, digits.images, digits.labels))
        assert not (before & ~now).any()
        before = now
    assert before.float().mean() > fooled(digits, digits.images).float().mean()


def test_labels_may_be_probabilities(digits):
    hard = FGSM(epsilon=0.1)(digits.model, digits.images, digits.labels)
    soft_labels = nn.functional.one_hot(digits.labels, 10).float()
    assert torch.equal(FGSM(epsilon=0.1)(digits.model, digits.images, soft_labels), hard)
    with pytest.raises(ValueError, match="class indices"):
        PGD(restarts=2)(digits.model, digits.images, soft_labels)


def test_the_loss_may_be_a_function(digits):
    def own(logits, labels):
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    found = BIM(loss=own)(digits.model, digits.images, digits.labels)
    assert torch.equal(found, BIM()(digits.model, digits.images, digits.labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l0"}, "norm to be one of linf.*'l0'"),
        ({"epsilon": -0.1}, "epsilon.*at least 0.*-0.1"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"step_size": -1}, "step_size"),
        ({"steps": 0}, "steps of at least 1"),
        ({"restarts": 0}, "restarts"),
        ({"decay": -1}, "decay"),
        ({"loss": "l2"}, "loss to be one of"),
        ({"restarts": 2, "random_start": False}, "random_start=True"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PGD(**options)


def test_refuses_a_bad_batch(digits):
    with pytest.raises(ValueError, match="float32"):
        PGD()(digits.model, digits.images.double(), digits.labels)
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\)"):
        PGD()(digits.model, digits.images[0], digits.labels)
    with pytest.raises(ValueError, match="one label per image, 100"):
        PGD()(digits.model, digits.images, digits.labels[:5])


def test_refuses_a_model_without_gradients(digits):
    def through_numpy(images):
        return torch.from_numpy(images.detach().numpy().reshape(len(images), -1))

    layer = nn.Linear(64, 10)

    def through_weights_alone(images):
        return layer(images.detach().mean(1).flatten(1))

    for name in ("pgd", "apgd-ce", "cw"):
        for model in (through_numpy, through_weights_alone):
            with pytest.raises(ValueError, match="differentiate"):
                build_attack(name, 0.1)(model, digits.images, digits.labels)


def test_build_attack():
    assert build_attack("pgd", 0.1, steps=3) == PGD(epsilon=0.1, steps=3)
    assert build_attack("mim", 0.5, "l2", decay=0.5) == MIM(epsilon=0.5, norm="l2", decay=0.5)
    assert build_attack("cw", 8).norm == "l2"
    assert build_attack("square", 0.1).attacks == ("square",)
    with pytest.raises(ValueError, match=r"fgsm, ffgsm.*'pdg' \(nearest: pgd\)"):
        build_attack("pdg", 0.1)
    with pytest.raises(ValueError, match=r"options of fgsm.*Received: steps"):
        build_attack("fgsm", 0.1, steps=3)
    with pytest.raises(ValueError, match="norm to be one of l2"):
        build_attack("cw", 8, "linf")


@pytest.mark.parametrize("norm", NORMS)
def test_attacks_a_model_whose_gradient_is_one_number_for_all_pixels(norm):
    """Autograd then gives an expanded tensor, which nothing may write to."""

    def brightness(images):
        total = images.sum((1, 2, 3))
        return torch.stack([total, -total], dim=1)

    images = torch.full((2, 3, 4, 4), 0.5)
    for attack in (PGD(norm=norm, random_start=False), MIM(norm=norm)):
        found = attack(brightness, images, torch.tensor([0, 1]))
        assert (found[0] <= images[0]).all() and (found[1] >= images[1]).all()
        assert (found.sum((1, 2, 3)) != images.sum((1, 2, 3))).all()
