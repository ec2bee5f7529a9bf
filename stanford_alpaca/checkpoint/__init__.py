"""Checkpoints: how they are saved whole or not at all, verified, resumed from and exported.

``python -m stanford_alpaca.checkpoint export`` turns a checkpoint of any engine into a plain
Hugging Face folder.
"""
