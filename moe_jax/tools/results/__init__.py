"""What the runs below a folder came to: a table, CSV, a plot.

read.py reads run folders, group.py puts seeds together, table.py and plot.py show them.
"""
