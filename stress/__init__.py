"""Stress tests with real processes; see `stress.chaos` and `stress.soak`. They need what the package itself needs.

| file | what |
|---|---|
| `chaos.py`, `soak.py` | the two commands |
| `stage.py` | one segment over a copied checkpoint, and every process around it |
| `crew.py`, `worker.py` | the workers: how they are started, heard and replaced; the program that each of them is |
| `pagers.py`, `pager.py` | the same for the pager and its standby |
| `truth.py`, `work.py` | what bytes and outputs must be; the work that is handed out, and whether it was done right |
| `plan.py`, `tormentor.py` | what is done to them, from a seed; how it is done |
| `timeline.py` | which faults were in force when, so that errors they explain are told from others |
| `checks.py` | what must hold at the end |
| `journal.py`, `programs.py` | how one that may be killed tells what it did; processes that are never left behind |
| `commands.py`, `display.py` | options, exit codes and progress, for both commands |
| `growth.py` | samples of memory, descriptors and latency, and whether they grow |
"""
