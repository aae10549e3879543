"""The settings of a local leaderboard: the weight of each part of the score, and the attacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robust_submission.cli.errors import UserError

DEFAULTS = Path(__file__).with_name("weights.yaml")
KNOWN_ATTACKS = {
    "black_box": ("transfer", "square"),
    "white_box": ("fgsm", "ffgsm", "bim", "mim", "pgd"),
}
"""The attacks that may be in a pool."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weight of each part; only their ratios matter."""

    clean: float = 4
    """Of images as they are."""
    corrupted: float = 4
    """Of corrupted images."""
    black_box: float = 4
    """Of attacks without the model's gradients."""
    white_box: float = 3
    """Of attacks with them."""

    def __post_init__(self) -> None:
        values = vars(self).values()
        if min(values) < 0 or not sum(values):
            raise UserError("weights: expected none below 0 and not all 0.")

    def of(self, columns: Sequence[str]) -> dict[str, float]:
        """The weight of each part among `columns`.

        Raises:
            UserError: none of them has a weight above 0.
        """
        weights = {part: weight for part, weight in vars(self).items() if part in columns}
        if not sum(weights.values()):
            raise UserError("weights: expected one above 0 of a measured part, found none.")
        return weights


@dataclass(frozen=True, kw_only=True)
class AttackPool:
    """The attacks that may be drawn for an image."""

    severities: Sequence[int]
    """Of corruptions, 1 to 5."""
    black_box: Sequence[str]
    white_box: Sequence[str]
    epsilon: Sequence[float]
    """Linf radii, pixel values from 0 to 1."""
    steps: int
    queries: int
    """Of Square."""
    seed: int
    """Of all draws."""

    def __post_init__(self) -> None:
        for field, known in KNOWN_ATTACKS.items():
            if unknown := sorted(set(getattr(self, field)) - set(known)):
                raise UserError(f"--{field}: expected {', '.join(known)}, found {unknown[0]}.")
        for field in ("black_box", "white_box", "epsilon", "severities"):
            if not getattr(self, field):
                raise UserError(f"--{field}: expected at least one, found none.")
        if wrong := [radius for radius in self.epsilon if not 0 < radius <= 1]:
            expected = "above 0 and up to 1, as pixels are 0 to 1 (8/255)"
            raise UserError(f"--epsilon: expected {expected}, found {wrong[0]}.")
        if unknown := sorted(set(self.severities) - set(range(1, 6))):
            raise UserError(f"--severities: expected 1 to 5, found {unknown[0]}.")
