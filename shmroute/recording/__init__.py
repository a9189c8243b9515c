"""What workers really routed, written down by the routing kernel itself.

With `RuntimeConfig(trace=folder)` every process that routes appends to a file of its own there: what it chose, how it
weighed, which residency it consulted, which bonus was in force, how long leases waited. Recording never blocks a
worker: it takes no lock, makes no system call and allocates nothing; what finds no room is counted instead of written.
A worker may be killed at any instruction: what it had written stays readable.

| file | |
|---|---|
| `records` | the format of a file, word by word |
| `append` | the kernels that write records |
| `grow`, `system` | how a file grows ahead of need; the system calls of that |
| `recorder` | one process's file: made, grown by a thread, ended |

`shmroute.traces` reads the files, and merges those of a run (`recorded_files`, `merging`).
"""
