"""Measurements of the runtime beside its peers, for ``shmroute bench``: one file for each group of them.

See `shmroute.bench.measuring` for how a figure comes about, and `shmroute.bench.suite` for what there is.
"""
