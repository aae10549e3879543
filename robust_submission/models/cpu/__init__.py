"""Faster kernels for the layers of a network on a CPU: the same results within rounding."""

from robust_submission.models.cpu.optimize import optimize_for_cpu

__all__ = ["optimize_for_cpu"]
