"""Prompts, the responses to them, and the files in which both are written."""
