"""Kernels of our own, as operators of torch.

Each operator is defined with its arguments, the shapes of its result (for tensors without data), what it computes in
torch's own words (used on a CPU, and as the reference in tests), and a kernel in Triton, which comes with torch for
CUDA and is imported when the first one runs.
"""
