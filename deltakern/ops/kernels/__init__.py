"""The Triton kernels and their launchers, one file an op. An op imports its file, and so Triton, at the first call that needs it."""
