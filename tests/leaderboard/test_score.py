"""The local leaderboard: closed forms where there are some, honest columns, no unvouched code."""

import json
import math
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robust_submission.cli.command import parse
from robust_submission.leaderboard.load import Contestant, Origin, load_contestant
from robust_submission.leaderboard.scorer import Score, Scorer, Setting, interval
from robust_submission.models.classifier import RobustClassifier, undefended
from robust_submission.models.load import load_checkpoint
from robust_submission.packaging.export import write_zip
from submission.score import Options, Weights, check_logits, score, table
from tests.conftest import run_command

SETTING = Setting(
    severities=[1, 5],
    black_box=("transfer", "square"),
    white_box=("fgsm", "pgd"),
    epsilon=(8 / 255,),
    steps=3,
    queries=20,
    seed=0,
)


@pytest.fixture(scope="module")
def packed(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip of a small run, with GCM."""
    out = tmp_path_factory.mktemp("packed") / "submission.zip"
    write_zip(load_checkpoint(small_run), out)
    return out


def test_the_views_of_a_package(packed: Path, small_run: Path, tmp_path: Path):
    contestant = load_contestant(packed, tmp_path, Origin(checkpoint=small_run), None, trust=False)
    model = load_checkpoint(small_run)
    assert contestant.known and contestant.differentiable and contestant.twin is not None
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    for view in (contestant.model, contestant.revealed):
        torch.testing.assert_close(view(images), model(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(contestant.twin(images), undefended(model)(images))
    honest = torch.autograd.grad(undefended(model)(images).sum(), images)[0]
    revealed = torch.autograd.grad(contestant.revealed(images).sum(), images)[0]
    masked = torch.autograd.grad(contestant.model(images).sum(), images)[0]
    torch.testing.assert_close(revealed, honest, rtol=1e-2, atol=1e-5)
    assert masked.abs().max() > 1e5 * honest.abs().max()


def test_the_revealed_view_averages_over_draws_that_do_not_judge(tmp_path: Path):
    model = RobustClassifier(
        class_names=["a", "b", "c"],
        backbone="test_convnext",
        image_size=32,
        conceal=False,
        randomize={"min_size": 20},
    )
    model.eval().save_pretrained(tmp_path)
    write_zip(model, tmp_path / "a.zip")
    contestant = load_contestant(
        tmp_path / "a.zip", tmp_path / "out", Origin(checkpoint=tmp_path), None, trust=False
    )
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        draws = list[Tensor]()
        for draw in range(9):
            model.randomize.draw = draw  # pyright: ignore[reportAttributeAccessIssue]
            draws.append(model(images))
        torch.testing.assert_close(contestant.model(images), draws[0], rtol=0, atol=1e-5)
        expected = torch.stack(draws[1:]).softmax(2).mean(0).log()
        torch.testing.assert_close(contestant.revealed(images), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(contestant.model(images), draws[0], rtol=0, atol=1e-5)


class Brightness(nn.Module):
    """Two classes: darker and brighter than 0.5, by the mean."""

    def forward(self, images: Tensor) -> Tensor:
        score = 100 * (images.mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)


def contestant(known: bool = True) -> Contestant:
    model = Brightness()
    return Contestant(model=model, revealed=model, twin=model, differentiable=True, known=known)


def test_attacks_reach_just_as_far_as_their_epsilon():
    """A mean m falls to exactly the attacks with epsilon > |m - 0.5|."""
    levels = 0.5 + torch.tensor([0.5, 1.5, 2.5, 3.5]) * 8 / 255
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    labels, indices = torch.ones(4, dtype=torch.int64), torch.arange(4)
    setting = Setting(**{**vars(SETTING), "epsilon": (16 / 255,), "black_box": ("transfer",)})
    scorer = Scorer(contestant(), setting)
    for column, expected in [
        ("clean", [True] * 4),
        ("white_box", [False, False, True, True]),
        ("black_box", [False, False, True, True]),
        ("adaptive", [False, False, True, True]),
    ]:
        assert scorer.judge(column, 0, images, labels, indices).tolist() == expected, column


def test_what_an_image_meets_depends_on_seed_draw_and_image_alone():
    scorer = Scorer(contestant(), SETTING)
    drawn = scorer._draw(1, 0, list(range(200)), 5)
    assert (drawn[60:70] == scorer._draw(1, 0, list(range(60, 70)), 5)).all()
    assert (drawn != scorer._draw(1, 1, list(range(200)), 5)).any()
    assert (drawn != scorer._draw(2, 0, list(range(200)), 5)).any()
    counts = torch.bincount(torch.from_numpy(drawn), minlength=5)
    assert counts.min() > 20


def test_without_known_stages_the_right_column_tries_blind_attacks_too():
    """A model whose gradient is zero everywhere falls to transfer and Square alone."""

    class Steps(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            hard = (images.mean((1, 2, 3)) > 0.5).float()
            return torch.stack([1 - hard, hard], 1) + 0 * images.sum((1, 2, 3))[:, None]

    model = Steps()
    images = torch.full((3, 3, 8, 8), 0.51)
    labels, indices = torch.ones(3, dtype=torch.int64), torch.arange(3)
    found = dict[bool, bool]()
    for known in (True, False):
        one = Contestant(
            model=model, revealed=model, twin=Brightness(), differentiable=True, known=known
        )
        scorer = Scorer(one, Setting(**{**vars(SETTING), "white_box": ("bim",)}))
        assert scorer.judge("white_box", 0, images, labels, indices).all()
        found[known] = bool(scorer.judge("adaptive", 0, images, labels, indices).any())
    assert found == {True: True, False: False}


def test_the_score_is_the_weighted_mean_of_each_draw():
    columns = {
        "clean": [0.8, 0.8],
        "corrupted": [0.6, 0.4],
        "black_box": [0.5, 0.5],
        "white_box": [0.7, 0.7],
        "adaptive": [0.1, 0.2],
    }
    weights = {"clean": 1.0, "corrupted": 2.0, "black_box": 0.0, "white_box": 1.0}
    result = Score(columns=columns, weights=weights)
    assert result.total() == pytest.approx([(0.8 + 1.2 + 0.7) / 4, (0.8 + 0.8 + 0.7) / 4])
    assert result.total(adaptive=True) == pytest.approx([2.1 / 4, 1.8 / 4])
    found = interval([0.4, 0.6])
    assert found["mean"] == 0.5 and found["low"] == pytest.approx(0.5 - 2 * math.sqrt(0.02))


def test_a_single_draw_has_no_interval():
    assert interval([0.4]) == {"mean": 0.4, "low": None, "high": None}
    board = table("title", Score(columns={"clean": [0.4]}, weights={"clean": 1.0}))
    assert next(iter(board.columns[2].cells)) == "40.0%"
    several = table("title", Score(columns={"clean": [0.4, 0.4]}, weights={"clean": 1.0}))
    assert next(iter(several.columns[2].cells)) == r"40.0% \[40.0%, 40.0%]"


def test_every_weight_is_explained(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(Options, ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        "images as they are",
        "corrupted",
        "attacks without the model's",
        "attacks with them",
    ):
        assert f"Of {part}" in printed, part


def test_the_command_writes_the_board(packed: Path, small_run: Path, tmp_path: Path):
    out = tmp_path / "score.json"
    small = ("--limit", 20, "--draws", 2, "--steps", 2, "--queries", 5, "--severities", "[1]")
    done = run_command(
        "submission/score.py", packed, "--checkpoint", small_run, "--out", out, *small
    )
    assert done.returncode == 0, done.stderr
    board = json.loads(out.read_text())["score"]
    assert set(board) >= {"clean", "corrupted", "black_box", "white_box", "adaptive", "score"}
    assert all(len(each["draws"]) == 2 and 0 <= each["mean"] <= 1 for each in board.values())
    assert board["clean"]["draws"][0] == board["clean"]["draws"][1] > 0.3
    assert board["adaptive"]["mean"] <= board["white_box"]["mean"]
    shares = [4 * board[name]["mean"] for name in ("clean", "corrupted", "black_box")]
    expected = (sum(shares) + 3 * board["white_box"]["mean"]) / 15
    assert board["score"]["mean"] == pytest.approx(expected)
    assert "as the organisers attack" in done.stdout


def test_a_package_that_nobody_vouches_for_is_not_run(
    packed: Path, small_run: Path, tmp_path: Path
):
    foreign = tmp_path / "foreign.zip"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("model.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    for package, checkpoint in ((foreign, small_run), (packed, None)):
        with pytest.raises(ValueError, match="--trust"):
            load_contestant(
                package, tmp_path / package.stem, Origin(checkpoint=checkpoint), None, trust=False
            )
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="has no attribute 'Model'"):
        load_contestant(foreign, tmp_path / "out", Origin(), None, trust=True)
    assert (tmp_path / "ran").exists()


LINEAR = """
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3072, 10)
    def forward(self, images):
        return self.linear(images.flatten(1))
"""


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("super()", "undefined; super()", "NameError"),
        ("super()", "assert not 1; super()", "AssertionError"),
        ("flatten(1))", "flatten(1)), 1", "AttributeError: 'tuple'"),
        ("3072", "12", "RuntimeError"),
    ],
)
def test_a_trusted_package_that_raises_is_named(tmp_path: Path, old: str, new: str, found: str):
    package = tmp_path / "a.zip"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("model.py", LINEAR.replace(old, new))
    with pytest.raises(ValueError, match=f"^{package}: expected .* found {found}"):
        one = load_contestant(package, tmp_path / "out", Origin(), None, trust=True)
        check_logits(package, one.model, 32, 10)


def test_a_bomb_is_not_read(small_run: Path, tmp_path: Path):
    package = tmp_path / "a.zip"
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.py", "")
        archive.writestr("model.safetensors", bytes(20 << 20))
    with pytest.raises(ValueError, match=f"^{package}: expected at most 100 times"):
        load_contestant(package, tmp_path, Origin(checkpoint=small_run), None, trust=False)


def test_onnx_of_one_image_at_a_time_and_broken_onnx(tmp_path: Path):
    package, model = tmp_path / "a.onnx", nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    torch.onnx.export(model, (torch.zeros(1, 3, 4, 4),), package, verbose=False)
    images = torch.rand(3, 3, 4, 4)
    found = load_contestant(package, tmp_path, Origin(), None, trust=False).model(images)
    torch.testing.assert_close(found, model(images.flip(1)), rtol=1e-4, atol=1e-5)
    package.write_bytes(package.read_bytes()[:99])
    with pytest.raises(ValueError, match=f"^{package}: expected a submission"):
        load_contestant(package, tmp_path, Origin(), None, trust=False)


def test_a_score_without_weights_is_refused_before_the_work(small_run: Path, tmp_path: Path):
    weights = Weights(clean=0, corrupted=0, black_box=1, white_box=0)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("model.py", LINEAR)
    options = {"checkpoint": small_run, "black_box": ("transfer",), "trust": True}
    with pytest.raises(ValueError, match="weights: expected one above 0"):
        score(Options(file=tmp_path / "a.zip", weights=weights, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"white_box": ("square",)}, "--white_box: expected .*found square"),
        ({"white_box": ("cw",)}, "--white_box: expected .*found cw"),
        ({"white_box": ("apgd-ce",)}, "--white_box: expected .*found apgd-ce"),
        ({"black_box": ("pgd",)}, "--black_box: expected transfer, square, found pgd"),
        ({"severities": [6]}, "--severities: expected 1 to 5, found 6"),
        ({"epsilon": ()}, "--epsilon: expected at least one"),
    ],
)
def test_settings_are_checked(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Setting(**{**vars(SETTING), **options})


def test_classes_must_be_the_datas(packed: Path, small_run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="expected a submission, found nothing there"):
        score(Options(file=tmp_path / "none.zip", checkpoint=small_run))
    with pytest.raises(ValueError, match="--draws: expected at least 1"):
        Options(file=packed, draws=0)
