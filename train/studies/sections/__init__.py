"""What is said of batch normalization, and what the jobs at hand showed of it: a file a claim.

Each has `section(compared)`, which makes a part of a report of series of runs, the first of which is the
baseline; None where the runs have nothing to say of it. Every sentence is computed from what was measured.
"""
