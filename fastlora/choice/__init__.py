"""Which implementation runs where: checked, timed, written down.

clock   calls timed in turn
table   what was measured, shipped or on this machine
measure how an implementation is checked and timed
trial   what to measure, when, and in which process
"""
