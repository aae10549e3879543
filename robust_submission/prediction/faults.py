"""Faults by kind: every one counted and placed, the first of each kind in words."""

from collections import Counter
from collections.abc import Iterable

from robust_submission.prediction.rows import Fault

SHOWN = 20  # of each kind, in words; the lines of the others follow
RANGES = 12


def line_ranges(lines: Iterable[int]) -> str:
    """Lines in short: 3, 4, 5, 9 -> "3-5, 9"; after `RANGES` of them "…" and the last."""
    ranges = list[list[int]]()
    for line in sorted(set(lines)):
        if ranges and line == ranges[-1][1] + 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    words = [f"{first}-{last}" if first != last else f"{first}" for first, last in ranges]
    if len(words) > RANGES:
        words[RANGES - 1 : -1] = ["…"]
    return ", ".join(words)


class Faults:
    """Collects faults; `add` is the `report` of the readers in inference/."""

    def __init__(self) -> None:
        self._shown = list[Fault]()
        self._further = dict[str, list[int]]()
        self._counts = Counter[str]()

    def __len__(self) -> int:
        return self._counts.total()

    def add(self, fault: Fault) -> None:
        self._counts[fault.kind] += 1
        if self._counts[fault.kind] <= SHOWN:
            self._shown.append(fault)
        else:
            self._further.setdefault(fault.kind, []).append(fault.entry or fault.line or 0)

    def lines(self, places: str = "lines") -> list[str]:
        """One text a fault, by line; then one a kind that has more than `SHOWN`."""
        shown = sorted(self._shown, key=lambda fault: (fault.line or 1 << 62, fault.entry or 0))
        further = [
            f"{len(lines)} more of the kind '{kind}', {places} {line_ranges(lines)}"
            for kind, lines in self._further.items()
        ]
        return [*map(str, shown), *further]
