"""Training: recipes, objectives, the loop, the run folder."""
