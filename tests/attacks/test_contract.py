"""What holds for every attack: one table of cases, each put through the contract."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from robust_submission.attacks import ATTACKS, NORMS, PGD, AutoAttack, build_attack
from robust_submission.cli.errors import UserError

GRADIENT = ["fgsm", "ffgsm", "bim", "mim", "pgd"]
BUDGETS = {"linf": 0.15, "l2": 0.8, "l1": 8.0, "l1-dense": 8.0}
QUICK = {"cw": {"steps": 20}, "square": {"queries": 300}}


def case(name: str, norm: str, epsilon: float):
    return pytest.param(
        build_attack(name, epsilon, norm, **QUICK.get(name, {})), id=f"{name}-{norm}"
    )


OURS = [case(name, norm, BUDGETS[norm]) for norm in NORMS for name in GRADIENT]
CW = case("cw", "l2", 1.0)
OTHERS = [
    CW,
    case("fmn", "linf", 0.1),
    case("fmn", "l1", 3.0),
    case("ddn", "l2", 0.6),
    *(case(name, "linf", 0.1) for name in ("apgd-ce", "apgd-t", "fab-t", "square", "screen")),
    *(case(name, "l2", 0.6) for name in ("apgd-dlr", "apgd-t", "fab-t", "square", "screen")),
    *(case(name, "l1", 3.0) for name in ("apgd-ce", "fab", "square")),
]
ONE_OF_EACH = [
    CW,
    *(case(name, "linf", 0.15) for name in ("ffgsm", "mim", "noise", "fmn", "apgd-ce", "screen")),
]


def check_inside(attack, found, images):
    assert found.shape == images.shape and found.dtype == torch.float32 and found.isfinite().all()
    assert found.min() >= 0 and found.max() <= 1
    size = NORMS[attack.norm].size(found.double() - images.double())
    assert (size <= attack.epsilon * (1 + 1e-5)).all()


@pytest.mark.parametrize("attack", OURS)
def test_our_attacks_raise_every_loss_and_lower_accuracy(digits, attack):
    found = attack(*digits)
    check_inside(attack, found, digits.images)
    # A saturated loss of 0 can only stay; a step as long as the ball overshoots on a few.
    before, after = digits.losses(digits.images), digits.losses(found)
    single = attack.steps == 1
    assert (after > before).float().mean() >= (0.9 if single else 0.99)
    assert after.mean() > (2 if single else 3) * before.mean()
    assert digits.accuracy(found) < digits.accuracy(digits.images) - 0.05


@pytest.mark.parametrize("attack", OTHERS)
def test_other_attacks_are_no_weaker_than_one_step(digits, attack):
    some = digits.first(30)
    images = some.images.contiguous(memory_format=torch.channels_last)
    found = attack(some.model, images, some.labels)
    check_inside(attack, found, images)
    assert some.accuracy(found) < some.accuracy(images)
    step = build_attack("fgsm", attack.epsilon, attack.norm)(*some)
    weak = isinstance(attack, AutoAttack) and attack.attacks[0] in ("square", "apgd-dlr")
    assert some.accuracy(found) <= some.accuracy(step) or weak


@pytest.mark.parametrize("name", list(ATTACKS))
def test_epsilon_0_and_no_images_give_the_same_bytes_in_a_new_tensor(digits, name):
    found = build_attack(name, 0)(*digits)
    assert found.numpy().tobytes() == digits.images.numpy().tobytes()
    assert found.data_ptr() != digits.images.data_ptr()
    assert build_attack(name, 0.1)(*digits.first(0)).shape == (0, 3, 8, 8)


class HalfFrozen(nn.Module):
    """Has everything that an attack could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(300, 8).requires_grad_(False)
        self.free = nn.Linear(8, 3).eval()
        self.free.weight.grad = torch.full_like(self.free.weight, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.free(self.frozen(images.flatten(1)).relu())


@pytest.mark.parametrize("name", list(ATTACKS))
def test_leaves_everything_unchanged(name):
    model, images = HalfFrozen(), torch.rand(4, 3, 10, 10)
    labels, before = model(images).argmax(1), images.clone()
    images.requires_grad_()
    state = torch.get_rng_state()
    options = {"cw": {"steps": 2}, "autoattack": {"queries": 10}, "square": {"queries": 10}}
    norm = "l2" if name in ("cw", "ddn", "square") else "linf"
    found = build_attack(name, 0.1, norm, **options.get(name, {}))(model, images, labels)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert model.training and model.frozen.training and not model.free.training
    assert not model.frozen.weight.requires_grad and model.free.weight.requires_grad
    assert torch.equal(model.free.weight.grad, torch.full_like(model.free.weight, 7))
    assert model.free.bias.grad is None and images.grad is None
    assert torch.equal(images, before)
    assert not found.requires_grad and found.grad_fn is None


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attack", ONE_OF_EACH)
def test_works_where_the_caller_records_no_gradients(digits, caller, attack):
    some = digits.first(8)
    expected = attack(*some)
    with caller():
        found = attack(some.model, some.images.clone(), some.labels.clone())  # inference tensors
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attack", ONE_OF_EACH)
def test_works_under_autocast(digits, attack):
    with torch.autocast("cpu", torch.bfloat16):
        assert digits.model(digits.images[:1]).dtype == torch.bfloat16
        found = attack(*digits)
        low = digits.accuracy(found)  # in the attacked precision: C&W stops right at the boundary
    check_inside(attack, found, digits.images)
    assert abs(low - digits.accuracy(attack(*digits))) < 0.05


def test_refuses_a_bad_batch(digits):
    model, images, labels = digits
    for batch, message in (
        ((images.double(), labels), "images: expected .*float32, found .*float64"),
        ((images[0], labels), r"found shape \(3, 8, 8\)"),
        ((images, labels[:5]), r"labels: expected one per image, 100 in all, found shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            PGD()(model, *batch)


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "cw"])
def test_a_model_without_gradients_is_the_users_mistake(digits, name):
    layer = nn.Linear(64, 10)
    for model in (
        lambda images: torch.from_numpy(images.detach().numpy().reshape(len(images), -1)),
        lambda images: layer(images.detach().mean(1).flatten(1)),  # a gradient for weights alone
    ):
        with pytest.raises(UserError, match="differentiate"):
            build_attack(name, 0.1)(model, digits.images, digits.labels)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pgd", {"norm": "l0"}, "norm: expected one of linf, .*, found 'l0'"),
        ("pgd", {"epsilon": -0.1}, "epsilon: expected at least 0, found -0.1"),
        ("pgd", {"epsilon": float("nan")}, "epsilon"),
        ("pgd", {"epsilon": float("inf")}, "epsilon: expected a finite number"),
        ("pgd", {"step_size": -1}, "step_size"),
        ("pgd", {"steps": 0}, "steps: expected at least 1"),
        ("pgd", {"restarts": 0}, "restarts"),
        ("pgd", {"decay": -1}, "decay"),
        ("pgd", {"loss": "l2"}, "loss: expected one of ce"),
        ("pgd", {"restarts": 2, "random_start": False}, "random_start: expected True"),
        ("autoattack", {"norm": "l1-dense"}, "norm"),
        ("autoattack", {"attacks": ()}, "attacks: expected a tuple of names"),
        ("autoattack", {"attacks": "square"}, "attacks: expected a tuple of names"),
        ("autoattack", {"attacks": ("pgd",)}, "attacks: expected one of"),
        ("autoattack", {"queries": 0}, "queries"),
        ("autoattack", {"epsilon": -1}, "epsilon"),
        ("screen", {"norm": "l1"}, "norm: expected one of linf, l2"),
        ("cw", {"norm": "linf"}, "norm: expected one of l2"),
        ("cw", {"steps": 0}, "steps"),
        ("cw", {"epsilon": -1}, "epsilon"),
        ("ddn", {"norm": "linf"}, "norm: expected one of l2"),
        ("fmn", {"norm": "l2"}, "norm: expected one of linf, l1, l1-dense"),
        ("fmn", {"steps": 0}, "steps"),
    ],
)
def test_bad_settings_are_a_value_error_and_by_name_a_users_mistake(name, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        ATTACKS[name](**options)
    assert not isinstance(raised.value, UserError)
    with pytest.raises(UserError, match=message):
        build_attack(name, **{"epsilon": 0.1, **options})


def test_build_attack():
    assert build_attack("pgd", 0.1, steps=3) == PGD(epsilon=0.1, steps=3)
    assert build_attack("mim", 0.5, "l2", decay=0.5) == ATTACKS["mim"](
        epsilon=0.5, norm="l2", decay=0.5
    )
    assert build_attack("cw", 8).norm == "l2"
    assert build_attack("square", 0.1) == replace(AutoAttack(epsilon=0.1), attacks=("square",))
    with pytest.raises(UserError, match=r"expected one of fgsm, ffgsm.*'pdg' \(nearest: pgd\)"):
        build_attack("pdg", 0.1)
    with pytest.raises(UserError, match=r"expected one of fgsm, .*, found PGD\("):
        build_attack(PGD(), 0.1)
    with pytest.raises(UserError, match=r"fgsm: expected options .*, found steps"):
        build_attack("fgsm", 0.1, steps=3)
