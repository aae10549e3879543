"""Robust classifiers behind GCM and TRN: trained, evaluated honestly, and submitted."""
