"""Prediction files and the honest report."""
