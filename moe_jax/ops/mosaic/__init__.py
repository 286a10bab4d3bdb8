"""The experts on Hopper GPUs: grouped matmuls, activation and the copies that bring their rows.

Pallas kernels lowered by Mosaic GPU.

Only `choose` may be imported anywhere; the kernels need a jax that has Mosaic GPU's interfaces.
"""
