"""Estimates a run's memory, communication and time from a model's configuration."""
