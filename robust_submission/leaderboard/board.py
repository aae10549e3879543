"""The board: shares of correctly classified images, weighted to a score, with their spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rich.table import Table
from rich.text import Text

from robust_submission.evaluation.jobs import Attacker
from robust_submission.leaderboard.scorer import Scorer
from robust_submission.leaderboard.settings import Weights


@dataclass(frozen=True, kw_only=True)
class Board:
    """Shares of correctly classified images by column, one number per draw."""

    columns: dict[str, list[float]]
    weights: Weights

    def score(self, *, adaptive: bool = False) -> list[float]:
        """The weighted score of each draw; `adaptive` with the attackers who know the defence."""
        weights = self.weights.of([*self.columns])
        columns = [
            self.columns[Attacker.ADAPTIVE if adaptive and part == "white_box" else part]
            for part in weights
        ]
        return [
            sum(weight * share for weight, share in zip(weights.values(), shares, strict=True))
            / sum(weights.values())
            for shares in zip(*columns, strict=True)
        ]

    def as_json(self) -> dict[str, dict[str, float | list[float] | None]]:
        """All draws, and the mean and spread of each column."""
        rows = {
            **self.columns,
            "score": self.score(),
            "adaptive_score": self.score(adaptive=True),
        }
        return {name: {**spread(draws), "draws": draws} for name, draws in rows.items()}

    def table(self, title: str) -> Table:
        """The board for the terminal."""
        table = Table(title=Text(title, "bold"), title_justify="left")
        for column in ("part", "weight", "oblivious attackers", "adaptive attackers"):
            table.add_column(column, justify="left" if column == "part" else "right")
        weights = self.weights.of([*self.columns])
        for part, weight in weights.items():
            oblivious = _in_words(self.columns[part])
            adaptive = _in_words(self.columns[Attacker.ADAPTIVE if part == "white_box" else part])
            table.add_row(part, f"{weight / sum(weights.values()):.0%}", oblivious, adaptive)
        table.add_section()
        scores = self.score(), self.score(adaptive=True)
        table.add_row("score", "", *map(_in_words, scores))
        return table


def spread(draws: Sequence[float]) -> dict[str, float | None]:
    """Mean, and two standard deviations to either side: where one more draw may well fall.

    With a single draw `low` and `high` are None.
    """
    mean = fmean(draws)
    if len(draws) == 1:
        return {"mean": mean, "low": None, "high": None}
    width = 2 * stdev(draws)
    return {"mean": mean, "low": max(0.0, mean - width), "high": min(1.0, mean + width)}


def _in_words(draws: Sequence[float]) -> str:
    mean, low, high = spread(draws).values()
    return f"{mean:.1%}" if low is None else rf"{mean:.1%} \[{low:.1%}, {high:.1%}]"


def remarks(scorer: Scorer) -> list[str]:
    """What a reader must know of the board of this submission."""
    found: list[str] = []
    submission = scorer.submission
    if submission.twin is None:
        found.append("no transfer attack: nothing to transfer from; give --twin or --checkpoint.")
    if not submission.differentiable:
        found.append("white box: autograd cannot follow ONNX, so no image was attacked.")
    if not submission.known:
        tried = [*(["gradients"] if submission.differentiable else []), *scorer.black_box]
        found.append(f"masking unknown: adaptive attackers tried {', '.join(tried)}.")
    return found
