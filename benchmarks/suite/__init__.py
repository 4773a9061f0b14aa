"""The sections of `benchmarks/gpu_suite.py`, and what runs them."""
