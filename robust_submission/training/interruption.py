"""SIGTERM and SIGINT: finish the step, save the state, say how to go on."""

import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Interruption:
    """Notes the signals that arrive in any process, so that all of them stop after the same step.

        with Interruption(accelerator) as interruption:
            for batch in loader:
                step(batch)
                if interruption.after_step(): ...

    A signal that comes again, as one that both a launcher and a scheduler send, changes nothing.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._received = 0
        self._asked: Tensor | None = None
        self._former = dict[signal.Signals, Any]()

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = max(self._received, number)

    def after_step(self) -> int:
        """The signal that all processes stop for now, or 0. To be asked after each step by each.

        One process looks at its own. Several ask one another, and look at what they asked after the
        step before: its answer is there without waiting for the device.
        """
        if self.accelerator.num_processes == 1:
            return self._received
        answer, self._asked = self._asked, self._largest()
        return 0 if answer is None else int(answer)

    def up_to_now(self) -> int:
        """The same, of signals up to now; waits for the device and all processes."""
        return int(self._largest())

    def _largest(self) -> Tensor:
        received = torch.full((), self._received, device=self.accelerator.device)
        largest = self.accelerator.reduce(received, "max")
        assert isinstance(largest, Tensor)
        return largest
