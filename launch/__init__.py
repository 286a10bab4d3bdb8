"""Launchers: they start training runs on this machine and on clusters.  None needs JAX."""
