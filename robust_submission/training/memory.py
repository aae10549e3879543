"""What happens when a step does not fit in the device's memory."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from robust_submission.cli.errors import UserError
from robust_submission.training.state import Training


def with_room(training: Training, share: int, gradients: Callable[[], Tensor]) -> Tensor:
    """Compute a step's gradients; where memory runs out, in more parts if the recipe lets it.

    The batch stays what it is, so the weights do too, within rounding; but for what each part
    draws or computes for itself: drop-path, batch norm, adversarial weight perturbation.

    Args:
        training: Its accelerator holds the number of parts, which stays as large as it became.
        share: Images of the step in this process.
        gradients: Adds up the gradients of all parts; begins anew at each call.

    Raises:
        UserError: memory runs out with parts that the recipe does not let be made smaller.
    """
    accelerator = training.accelerator
    while True:
        parts = accelerator.gradient_accumulation_steps
        try:
            return gradients()
        except torch.OutOfMemoryError as error:
            if not training.recipe.auto_batch_size or share % (2 * parts):
                raise UserError(_advice(share // parts)) from error
        # Behind the except clause: the error holds on to what the step had in memory.
        training.model.zero_grad()
        accelerator.gradient_accumulation_steps = 2 * parts
        tqdm.write(  # beside the progress bar
            f"warning: out of memory with {share // parts} images at once; "
            f"going on with gradient_accumulation {2 * parts}.",
            file=sys.stderr,
        )


def _advice(images: int) -> str:
    return (
        f"out of memory with {images} images at once: raise gradient_accumulation (same batch, or "
        "auto_batch_size finds it), set mixed_precision to bf16, or lower batch_size."
    )
