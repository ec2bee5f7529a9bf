"""Few-shot evaluation: tasks, examples, prompts, scores and predictions."""
