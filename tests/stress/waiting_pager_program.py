"""`tests/processes/pager_program.py`, ready before it is needed: its arguments come as one line of standard input."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from shmroute.shared.kernel import load_kernels

load_kernels()
arguments = sys.stdin.readline().split()
if arguments:
    sys.argv[1:] = arguments
    sys.path.append(str(Path(__file__).resolve().parents[1] / "processes"))
    importlib.import_module("pager_program")
