"""Where the time of a run went, restarts included.

account.py adds up the rows that watch/timekeeper.py writes, show.py prints and plot.py draws them.
"""
