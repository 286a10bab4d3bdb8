"""Checks on the user's own devices that a config routes, learns and saves correctly."""
