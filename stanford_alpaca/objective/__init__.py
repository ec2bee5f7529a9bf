"""The objective inside a model: its output layer, what it needs to know of the model, and its numbers."""
