"""``memory_program.py FOLDER NAME``: load on the runtime NAME, or by Transformers alone if that is ``stock``, and run.

Prints the peak of this process's resident memory, in bytes, less shared memory.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
import transformers

import shmroute
from shmroute.integrations.transformers import load

folder, name = sys.argv[1:]
ids = torch.tensor([[5, 6, 7]])
if name == "stock":
    transformers.AutoModelForCausalLM.from_pretrained(folder)(ids)
else:
    with shmroute.attach(name) as runtime:
        load(folder, runtime, timeout=60)(ids)
status = Path("/proc/self/status").read_text()
peak, shared = (int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) for field in ("VmHWM", "RssShmem"))  # type: ignore[index]
print((peak - shared) * 1024)
