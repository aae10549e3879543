"""The prediction file: written, read and validated."""
