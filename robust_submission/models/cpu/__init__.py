"""The CPU's own ways to compute a network."""
