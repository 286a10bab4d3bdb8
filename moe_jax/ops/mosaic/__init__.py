"""Kernels for the experts on Hopper GPUs: grouped matmuls, activation and dispatch of their rows.

They are Pallas kernels, lowered by Mosaic GPU.

Only `choose` may be imported anywhere; the kernels need a jax that has Mosaic GPU's interfaces.
"""
