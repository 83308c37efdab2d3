"""Runs beside one another: what they share, a leaderboard, `comparison.csv` and `comparison.html`."""
