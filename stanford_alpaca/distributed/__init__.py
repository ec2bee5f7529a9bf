"""Ranks: how they communicate, how they wait for one another, and how they end."""
