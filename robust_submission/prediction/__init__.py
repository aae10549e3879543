"""The prediction file: planned, written, read and validated."""
