"""One training run: its flags, checks, data, model, record, and where it starts."""
