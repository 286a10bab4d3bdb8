"""The experts on Hopper GPUs, grouped matmul and activation: Pallas kernels lowered by Mosaic GPU.

Only `choose` may be imported anywhere; the kernels need a jax that has Mosaic GPU's interfaces.
"""
