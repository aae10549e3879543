"""Turns measured results into the robustness report: JSON, CSV, plots and one HTML page."""
