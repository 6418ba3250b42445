"""Hand-written kernels for CPUs and GPUs, and the choice between them."""
