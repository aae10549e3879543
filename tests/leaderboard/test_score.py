"""The local leaderboard: closed forms where there are some, honest columns, no untrusted code."""

import json
import math
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robust_submission.attacks.ensemble import EOT
from robust_submission.cli.errors import UserError
from robust_submission.leaderboard.board import Board, spread
from robust_submission.leaderboard.load import Submission, loaded_submission, require_logits
from robust_submission.leaderboard.scorer import Scorer
from robust_submission.leaderboard.settings import AttackPool, Weights
from robust_submission.models.classifier import RobustClassifier, set_draw, undefended
from robust_submission.models.load import load_checkpoint
from robust_submission.packaging.export import write_zip
from tests.conftest import run_command

POOL = AttackPool(
    severities=[1, 5],
    black_box=("transfer", "square"),
    white_box=("fgsm", "pgd"),
    epsilon=(8 / 255,),
    steps=3,
    queries=20,
    seed=0,
)
LINEAR = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Sizes:
    pixels: int = 3072

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(Sizes().pixels, 10)
    def forward(self, images):
        return self.linear(images.flatten(1))
"""


@pytest.fixture(scope="module")
def packed(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip of a small run, with GCM."""
    out = tmp_path_factory.mktemp("packed") / "submission.zip"
    write_zip(load_checkpoint(small_run), out)
    return out


def zipped(path: Path, source: str, **others: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.py", source)
        for name, content in others.items():
            archive.writestr(name, content)
    return path


def test_the_views_of_a_package(packed: Path, small_run: Path):
    model = load_checkpoint(small_run)
    with loaded_submission(packed, origin=model) as found:
        pass  # its stages need no further import
    assert found.known and found.differentiable and found.twin is not None
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    bare = undefended(model)
    for view, expected in ((found.model, model), (found.revealed, model), (found.twin, bare)):
        torch.testing.assert_close(view(images), expected(images), rtol=0, atol=1e-5)
    honest, revealed, masked = (
        torch.autograd.grad(view(images).sum(), images)[0]
        for view in (bare, found.revealed, found.model)
    )
    torch.testing.assert_close(revealed, honest, rtol=1e-2, atol=1e-5)
    assert masked.abs().max() > 1e5 * honest.abs().max()


def test_the_masking_of_anothers_package_is_not_known(packed: Path, tmp_path: Path):
    with loaded_submission(packed, trust=True) as found:
        assert not found.known  # only --checkpoint can tell
    stages = "self.restore, self.conceal, self.randomize = (nn.Hardtanh(), *2 * [nn.Identity()])"
    source = LINEAR.replace("self.linear =", f"{stages}\n        self.linear =")
    source = source.replace("images.flatten", "self.restore(images).flatten")
    with loaded_submission(zipped(tmp_path / "a.zip", source), trust=True) as found:
        images = torch.rand(2, 3, 32, 32)
        assert not found.known
        assert torch.equal(found.revealed(images), found.model(images))


def test_the_revealed_view_averages_over_draws_other_than_the_answers(tmp_path: Path):
    model = RobustClassifier(
        class_names=["a", "b", "c"],
        backbone="test_convnext",
        image_size=32,
        randomize={"min_size": 20},
    ).eval()
    write_zip(model, tmp_path / "a.zip")
    with loaded_submission(tmp_path / "a.zip", origin=model) as found:
        pass
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        answers = model(images)
        for _ in range(2):
            torch.testing.assert_close(found.model(images), answers, rtol=0, atol=1e-5)
            expected = EOT(model, range(1, 9), lambda draw: set_draw(model, draw))(images)
            assert not torch.allclose(expected, answers.log_softmax(1), rtol=0, atol=1e-3)
            torch.testing.assert_close(found.revealed(images), expected, rtol=0, atol=1e-4)


class Brightness(nn.Module):
    """Two classes: darker and brighter than 0.5, by the mean."""

    def forward(self, images: Tensor) -> Tensor:
        score = 100 * (images.mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)


class Steps(nn.Module):
    """The same classes, with a gradient that is 0 everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        bright = (images.mean((1, 2, 3)) > 0.5).float()
        return torch.stack([1 - bright, bright], 1) + 0 * images.sum((1, 2, 3))[:, None]


def submission(model: nn.Module, *, known: bool = True) -> Submission:
    return Submission(
        model=model, revealed=model, twin=Brightness(), differentiable=True, known=known
    )


def test_attacks_reach_just_as_far_as_their_epsilon():
    """A mean m falls to exactly the attacks with epsilon > |m - 0.5|."""
    levels = 0.5 + torch.tensor([0.5, 1.5, 2.5, 3.5]) * 8 / 255
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    pool = replace(POOL, epsilon=(16 / 255,), black_box=("transfer",))
    scorer = Scorer(submission(Brightness()), pool)
    for column, expected in [
        ("clean", [True] * 4),
        ("white_box", [False, False, True, True]),
        ("black_box", [False, False, True, True]),
        ("adaptive", [False, False, True, True]),
    ]:
        (found,) = scorer.classified(column, 1, images, torch.ones(4).long(), torch.arange(4))
        assert found.tolist() == expected, column


def test_the_attack_on_an_image_depends_on_seed_draw_and_image_alone():
    images = 0.5 + torch.rand(200, 1, 1, 1).expand(-1, 3, 2, 2) * 32 / 255
    pool = replace(POOL, epsilon=tuple(level / 255 for level in (2, 8, 14, 20, 26)), steps=1)
    scorer = Scorer(submission(Brightness()), pool)

    def classified(draws: int, first: int = 0, last: int = 200) -> Tensor:
        rows, labels = slice(first, last), torch.ones(last - first).long()
        indices = torch.arange(first, last)
        return scorer.classified("white_box", draws, images[rows].contiguous(), labels, indices)

    first, second = classified(2)
    assert 50 < first.sum() < 150
    assert torch.equal(first[None, 60:70], classified(1, 60, 70))
    assert not torch.equal(first, second)


def test_where_masking_is_unknown_adaptive_attackers_try_black_box_attacks_too():
    """A model whose gradient is 0 falls to transfer and Square alone."""
    images, labels = torch.full((3, 3, 8, 8), 0.51), torch.ones(3).long()
    withstood = dict[bool, bool]()
    for known in (True, False):
        scorer = Scorer(submission(Steps(), known=known), replace(POOL, white_box=("bim",)))
        assert scorer.classified("white_box", 1, images, labels, torch.arange(3)).all()
        found = scorer.classified("adaptive", 1, images, labels, torch.arange(3))
        withstood[known] = bool(found.any())
    assert withstood == {True: True, False: False}


def test_the_score_is_the_weighted_mean_of_each_draw():
    columns = {
        "clean": [0.8, 0.8],
        "corrupted": [0.6, 0.4],
        "black_box": [0.5, 0.5],
        "white_box": [0.7, 0.7],
        "adaptive": [0.1, 0.2],
    }
    weights = Weights(clean=1, corrupted=2, black_box=0, white_box=1)
    board = Board(columns=columns, weights=weights)
    assert board.score() == pytest.approx([(0.8 + 1.2 + 0.7) / 4, (0.8 + 0.8 + 0.7) / 4])
    assert board.score(adaptive=True) == pytest.approx([2.1 / 4, 1.8 / 4])
    found = spread([0.4, 0.6])
    assert found["mean"] == 0.5 and found["low"] == pytest.approx(0.5 - 2 * math.sqrt(0.02))
    assert spread([0.4]) == {"mean": 0.4, "low": None, "high": None}
    for draws, words in ([0.4], "40.0%"), ([0.4, 0.4], r"40.0% \[40.0%, 40.0%]"):
        table = Board(columns={"clean": draws}, weights=weights).table("title")
        assert next(iter(table.columns[2].cells)) == words


def test_the_command_writes_the_board(packed: Path, small_run: Path, tmp_path: Path):
    out = tmp_path / "score.json"
    small = ("--limit", 20, "--draws", 2, "--steps", 2, "--queries", 5, "--severities", "[1]")
    words = (packed, "--checkpoint", small_run, "--out", out, *small)
    done = run_command("submission/score.py", *words)
    assert done.returncode == 0, done.stderr
    assert "oblivious attackers" in done.stdout and "adaptive attackers" in done.stdout
    board = json.loads(out.read_text())["score"]
    assert set(board) >= {"clean", "corrupted", "black_box", "white_box", "adaptive", "score"}
    assert all(len(each["draws"]) == 2 and 0 <= each["mean"] <= 1 for each in board.values())
    assert board["clean"]["draws"][0] == board["clean"]["draws"][1] > 0.3
    assert board["adaptive"]["mean"] <= board["white_box"]["mean"]
    shares = [4 * board[name]["mean"] for name in ("clean", "corrupted", "black_box")]
    expected = (sum(shares) + 3 * board["white_box"]["mean"]) / 15
    assert board["score"]["mean"] == pytest.approx(expected)


def test_an_untrusted_package_is_not_run(packed: Path, small_run: Path, tmp_path: Path):
    ran = tmp_path / "ran"
    foreign = zipped(tmp_path / "foreign.zip", f"open({str(ran)!r}, 'w')")
    for path, origin in ((foreign, load_checkpoint(small_run)), (packed, None)):
        with pytest.raises(UserError, match="--trust"), loaded_submission(path, origin=origin):
            pass
    assert not ran.exists()
    with (
        pytest.raises(UserError, match="has no attribute 'Model'"),
        loaded_submission(foreign, trust=True),
    ):
        pass
    assert ran.exists()


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("super()", "undefined; super()", "found NameError"),
        ("super()", "assert not 1; super()", "found AssertionError"),
        ("flatten(1))", "flatten(1)), 1", "expected logits 1 x 10, found a tuple"),
        ("3072", "12", "found RuntimeError"),
        ("10)", "9)", "expected logits 1 x 10, found 1 x 9"),
        ("10)", "10)  # as it is", ""),
    ],
)
def test_a_trusted_package_that_fails_is_named(tmp_path: Path, old: str, new: str, found: str):
    path = zipped(tmp_path / "a.zip", LINEAR.replace(old, new))

    def load() -> None:
        with loaded_submission(path, trust=True) as found:
            require_logits(path, found.model, 32, [*"abcdefghij"])

    if not found:
        return load()
    with pytest.raises(UserError, match=f"^{path}: .*{found}"):
        load()
    return None


def test_a_package_may_import_its_modules_when_it_is_called(tmp_path: Path):
    code = LINEAR.replace("return self", "import layers; return layers.same(self)")
    layers = b"def same(model): return lambda images: model.linear(images)"
    code = code.replace("same(self).linear(", "same(self)(")
    path = zipped(tmp_path / "a.zip", code, **{"layers.py": layers})
    before = set(sys.modules)
    with loaded_submission(path, trust=True) as found:
        require_logits(path, found.model, 32, [*"abcdefghij"])
    assert not {"model", "layers"} & (sys.modules.keys() - before)


def test_what_cannot_be_read_is_named(tmp_path: Path):
    bomb = zipped(tmp_path / "a.zip", "", weights=bytes(20 << 20))
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    for path, message in [
        (bomb, "expected at most 100 times"),
        (tmp_path / "a.onnx", "expected a submission that check.py passes"),
        (tmp_path / "none.zip", "expected a submission, found nothing there"),
    ]:
        with (
            pytest.raises(UserError, match=f"^{path}: {message}"),
            loaded_submission(path, trust=True),
        ):
            pass


def test_onnx_of_one_image_at_a_time(tmp_path: Path):
    path, model = tmp_path / "a.onnx", nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    torch.onnx.export(model, (torch.zeros(1, 3, 4, 4),), path, verbose=False)
    images = torch.rand(3, 3, 4, 4)
    with loaded_submission(path) as submission:
        found = submission.model(images)
    torch.testing.assert_close(found, model(images.flip(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"white_box": ("square",)}, "--white_box: expected .*found square"),
        ({"white_box": ("apgd-ce",)}, "--white_box: expected .*found apgd-ce"),
        ({"black_box": ("pgd",)}, "--black_box: expected transfer, square, found pgd"),
        ({"severities": [6]}, "--severities: expected 1 to 5, found 6"),
        ({"epsilon": (8.0,)}, "--epsilon: expected above 0 and up to 1"),
        ({"epsilon": ()}, "--epsilon: expected at least one"),
    ],
)
def test_the_pool_is_checked(options: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        replace(POOL, **options)


def test_weights_are_checked_before_the_work(tmp_path: Path):
    with pytest.raises(UserError, match="expected none below 0 and not all 0"):
        Weights(clean=0, corrupted=0, black_box=0, white_box=0)
    weights = ("--weights.clean=0", "--weights.corrupted=0", "--weights.white_box=0")
    words = (zipped(tmp_path / "a.zip", LINEAR), "--trust", "--black_box=transfer", *weights)
    digits = ("--data.name=digits", "--image_size=32", "--limit=10")
    done = run_command("submission/score.py", *words, *digits)
    assert done.returncode == 1, done.stderr
    assert "weights: expected one above 0 of a measured part, found none." in done.stderr


def test_a_twin_takes_images_of_the_same_size(packed: Path, small_run: Path):
    words = (packed, "--twin", small_run, "--data.name=digits", "--image_size=48", "--limit=10")
    done = run_command("submission/score.py", *words)
    assert done.returncode == 1 and "a twin for the submission's 48 px, found 32" in done.stderr
