"""A pager process: ``python pager_program.py NAME [standby]``; prints each change of its role, then its outcome."""

from __future__ import annotations

import sys

from shmroute.pager.process import run_pager
from shmroute.shared.kernel import load_kernels
from shmroute.shared.segment import attach_segment

load_kernels()
segment = attach_segment(sys.argv[1])
print("ready", flush=True)
outcome = run_pager(segment, standby="standby" in sys.argv, announce=lambda message: print(message, flush=True))
print(f"outcome {outcome.name}", flush=True)
