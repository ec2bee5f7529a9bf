"""Measures of references, of responses, against an oracle, and of whole sets of texts."""
