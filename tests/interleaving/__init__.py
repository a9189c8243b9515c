"""Every interleaving, every death: simulated processes over a real segment, one atomic operation at a time.

The kernels run interpreted, and so does the runtime's Python around them; a scheduler owns every atomic operation,
semaphore, lock and file as a point where another process may go on, or where this one dies.

| file | what |
|---|---|
| `simulation.py` | processes, threads, switch points, deaths: one run |
| `schedules.py` | a run's decisions as a string, and back |
| `strategies.py` | who decides: exhaustive, random, PCT, a script (Hypothesis), a replayed string |
| `machine.py` | memory: sequentially consistent, or with store buffers (x86 TSO) |
| `host.py` | the operating system that the processes see: time, threads, locks, semaphores, files, deaths |
| `histories.py` | what was called when, and whether that is linearizable |
| `ground.py` | the real segments that they stand on, put back before each run |
| `world.py` | what a world is, and one run of it |
| `worlds/` | what the processes do, and what must hold: one file for each protocol |
| `mutation.py`, `mutants/` | breaking a rule on purpose; each protocol rule, broken: what the search must find |
| `search.py` | many runs of a world; what they found, made as short as it gets |
| `__main__.py` | the same from a command line: search, replay, mutants, worlds |
"""
