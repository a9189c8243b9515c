"""What the processes share: one file per structure, each with its words, its kernels and its thin view.

Nothing here knows of routing rules or of paging policy; `shmroute.routing` and `shmroute.pager` meet only
through these structures.
"""
