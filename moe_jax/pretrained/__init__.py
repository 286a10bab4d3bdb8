"""Trained models, read from a workdir and written to a folder of their own."""
