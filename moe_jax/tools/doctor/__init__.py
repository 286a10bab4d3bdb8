"""Proves on the user's own devices that a config routes, learns and saves as it should."""
