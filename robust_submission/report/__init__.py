"""The robustness report: one HTML page, JSON, CSV and plots."""
