"""Kills a run of two processes at random moments and compares it with one that was left alone."""
