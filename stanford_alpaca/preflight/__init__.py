"""What a run would need: memory, communication and time, from the configuration of a model."""
