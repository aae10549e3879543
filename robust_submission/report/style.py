"""How the report's pictures look, and how they are written.

Equal input gives equal bytes: no date, no version.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from robust_submission.cli.files import atomic_write

INK, MUTED, LINE, PAPER = "#16181d", "#5a6172", "#d9dce2", "#fdfdfc"
STYLE: dict[RcKeyType, Any] = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def write_png(figure: Figure, path: Path, dots: int) -> None:
    """Write a figure atomically, at `dots` per inch, without date or version."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dots, metadata={"Software": None})
