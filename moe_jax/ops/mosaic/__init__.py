"""Grouped matmul for Hopper GPUs: Pallas kernels lowered by Mosaic GPU."""
