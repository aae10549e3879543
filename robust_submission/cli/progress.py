"""A progress bar over work whose parts differ in cost by orders of magnitude."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class WorkBar:
    """Shows the share of the work that is done and, from its pace so far, the time that is left.

    Work is counted in one unit of cost, such as a forward pass of one image. What is expected is an
    upper estimate: when a part costs less, the total shrinks.

    Args:
        hidden: Show nothing, as in all processes but the main one.
    """

    def __init__(self, *, hidden: bool) -> None:
        self._hidden = hidden

    @contextmanager
    def over(self, expected: int) -> Iterator[None]:
        """Show the bar over so much work."""
        self._expected = expected
        shape = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(
            total=expected, disable=self._hidden, smoothing=0, miniters=1, bar_format=shape
        ) as self._bar:
            yield

    @contextmanager
    def part(self, expected: int) -> Iterator[None]:
        """Do a part of the work that costs at most about so much."""
        before = self._bar.n
        yield
        self.expect(int(self._bar.n - before) - expected)

    def name(self, text: str) -> None:
        """Name the part that comes next."""
        self._bar.set_description(text, refresh=False)

    def tick(self, done: int) -> None:
        """So much more is done."""
        self._bar.total = max(self._expected, self._bar.n + done)
        self._bar.update(done)

    def skip(self, done: int) -> None:
        """So much was done before: it counts for the share, but not for the pace."""
        if not self._hidden:
            self._bar.n += done
            self._bar.initial += done

    def expect(self, more: int) -> None:
        """So much more is to be done than was expected; less if negative."""
        self._expected += more
        self._bar.total = max(self._expected, self._bar.n)
