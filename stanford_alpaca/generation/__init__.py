"""Prompts, responses to them, and the files they are written to."""
