"""Automatic BPDA: gradients that follow the values of any model, found by watching it compute.

Backward pass differentiable approximation (Athalye et al. 2018) keeps a defence in the forward pass
and replaces its gradient. `BPDA` does so for a model of which nothing is known: it watches the
operations of a forward pass, and passes the gradient straight through those that have none, or one
that has nothing to do with their values. It changes no prediction.
"""

from robust_submission.models.bpda.operations import Through
from robust_submission.models.bpda.view import BPDA

__all__ = ["BPDA", "Through"]
