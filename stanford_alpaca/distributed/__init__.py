"""Ranks: what they say to one another, who waits for whom, and how they end."""
