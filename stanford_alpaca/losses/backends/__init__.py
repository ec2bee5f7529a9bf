"""Backends of the loss: the reference, chunks with PyTorch or Triton kernels, vocabulary shards."""
