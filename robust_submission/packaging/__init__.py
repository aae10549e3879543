"""A checkpoint as a model package that needs torch and numpy alone."""
