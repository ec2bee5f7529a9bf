"""The loss bench: trains losses alike, and compares what they do."""
