"""A local leaderboard of model packages."""
