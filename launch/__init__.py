"""Launchers: command lines for clusters.  Nothing here needs JAX."""
