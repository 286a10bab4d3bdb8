"""Shows how a run spent its time, including restarts.

account.py adds up the rows that watch/timekeeper.py writes; show.py prints the sums, and plot.py
draws them.
"""
