"""Measures robustness: attacks a model as each attacker sees it, and checks for masking.

views: what each attacker differentiates. plan: which attacks are run. runner: runs them on chunks
of images, over any number of processes. results: what was measured. checks: signs of masking.
"""
