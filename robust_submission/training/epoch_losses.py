"""The losses of an epoch, kept on the device and looked at now and then, not at every step."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_submission.cli.errors import UserError
from robust_submission.training.run_folder import RunFolder

CHECK_STEPS = 50
"""Steps between two looks, each of which waits for the device."""


class EpochLosses:
    """This process's loss in each step of the epoch that the run folder stands in.

    Args:
        folder: Holds the losses of the steps that were done before a resume.
        steps: Of the whole epoch.
        accelerator: Gathers what all processes found.
    """

    def __init__(self, folder: RunFolder, steps: int, accelerator: Accelerator) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.start = self.done = len(folder.losses)
        self.values = torch.zeros(steps, device=accelerator.device)
        self.values[: self.done] = folder.losses
        self._rates = list[float]()

    def add(self, loss: Tensor, lr: float, classifier: nn.Module) -> None:
        """Note the loss of a step and the learning rate that it was made with.

        Raises:
            UserError: it is time to look, and `check` finds something.
        """
        self.values[self.done] = loss
        self._rates.append(lr)
        self.done += 1
        if self.done % CHECK_STEPS == 0:
            self.check(classifier)

    def check(self, classifier: nn.Module) -> None:
        """Look at the losses and the weights. All processes, which find the same.

        Raises:
            UserError: one is NaN or infinite, in any process.
        """
        gathered = self.accelerator.gather(self.values[None, : self.done])
        assert isinstance(gathered, Tensor)
        losses = gathered.T  # (steps, processes)
        wrong = (~losses.isfinite()).nonzero()
        if len(wrong):
            step, process = wrong[0].tolist()
            self._fail(step, f"a finite loss, found {float(losses[step, process])}")
        weights = torch.stack([each.isfinite().all() for each in classifier.parameters()])
        if not weights.all():  # alike in all processes, or of all their shards
            self._fail(self.done - 1, "finite weights after it, found NaN or infinity")

    def mean(self) -> Tensor:
        """Over all steps of the epoch."""
        return self.values.mean()

    def _fail(self, step: int, what: str) -> None:
        place = f"epoch {len(self.folder.rows) + 1}, step {step + 1}"
        rate = f" at a learning rate of {self._rates[step - self.start]:.4g}" if self._rates else ""
        state = self.folder.last_state() or "none yet"
        raise UserError(f"{place}: expected {what}{rate}; the last good state is {state}.")
