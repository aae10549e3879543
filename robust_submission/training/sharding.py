"""Weights sharded over the processes (FSDP2), where accelerate's configuration asks for it."""

from copy import deepcopy

from accelerate import Accelerator, DistributedType

from robust_submission.cli.errors import UserError
from robust_submission.models.classifier import RobustClassifier


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether accelerate shards the weights."""
    return accelerator.distributed_type == DistributedType.FSDP


def whole_copy(accelerator: Accelerator, classifier: RobustClassifier) -> RobustClassifier | None:
    """A copy to take all the weights of a classifier that accelerate will shard; else None.

    Autocast alone then sets the precision, as without sharding: accelerate's policy would round the
    images too, before the attack and GCM, to the 8 bits of bfloat16.
    """
    if not is_sharded(accelerator):
        return None
    accelerator.state.fsdp_plugin.mixed_precision_policy = None  # pyright: ignore[reportOptionalMemberAccess]
    return deepcopy(classifier).to(accelerator.device)


def require_whole_weights(accelerator: Accelerator, what: str) -> None:
    """Refuse sharded weights to what differentiates, moves or lays them out itself.

    Raises:
        UserError: they are sharded.
    """
    if is_sharded(accelerator):
        raise UserError(
            f"{what}: expected whole weights in each process, received sharded ones (FSDP); "
            "use training/accelerate/many_gpus.yaml."
        )
