"""TRN, the Two-stream Restoration Network, in plain torch: these files need nothing else."""

from .network import TRN, DifferentiableTRN

__all__ = ["TRN", "DifferentiableTRN"]
