"""Loads trained models from a workdir, and saves them to a separate folder."""
