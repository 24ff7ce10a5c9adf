"""The kernels in Triton; importing a module of this package needs it."""
