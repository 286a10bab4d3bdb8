"""Kills a run of two processes at random moments and compares it with an uninterrupted run."""
