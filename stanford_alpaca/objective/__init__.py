"""The objective inside a model: its output layer, experiments on the model, and running sums."""
