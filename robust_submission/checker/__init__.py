"""Validating, packaging and scoring what is handed in."""
