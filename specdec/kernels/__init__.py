"""Hand-written code for what runs between a model's matrix products, and for these on CPUs.

base      what a set of kernels does for a decoder layer: `LayerKernels`
scoring   from products of queries and keys to weights, which they and torch's operators compute
cpu       the kernels for CPUs, bindings of cpu.cpp and its headers; compile makes the library
structs   what these functions take
gpu       the kernels for GPUs, in Triton
choose    which of them a tensor gets, if any
"""
