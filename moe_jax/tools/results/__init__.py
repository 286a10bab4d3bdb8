"""Compares the runs below a folder in a table, a CSV file and a plot.

read.py reads workdirs, group.py groups runs over seeds, table.py and plot.py show them.  compare.py
computes speed-ups against a baseline.  laws.py and fit.py fit scaling laws to arrays, fit_runs.py
to runs.
"""
