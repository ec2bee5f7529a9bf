"""One run of training: its flags, checks, data, model, record, and where it starts."""
