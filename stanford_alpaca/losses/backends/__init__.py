"""Statistics of each token and their gradients: as specified, in chunks, by kernels, or over a sharded vocabulary."""
