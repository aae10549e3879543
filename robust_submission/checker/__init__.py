"""Checks a submission, anyone's, against the rules of the challenge."""
