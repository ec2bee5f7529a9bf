"""What a run leaves behind: sharded checkpoints to resume from, and a plain Hugging Face folder at the end.

``python -m stanford_alpaca.checkpoint export`` makes the second of the first.
"""
