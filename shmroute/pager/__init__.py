"""The pager daemon: takes requests from the ring, loads experts into slots, evicts, prefetches, and buries the dead.

It meets the routers only through `shmroute.shared`. One pager at a time serves a segment, and it is a program of its
own (``python -m shmroute.pager``, or ``shmroute pager``).
"""
