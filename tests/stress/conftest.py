"""Makes `stress` importable here, and `tests/processes`, whose worlds and programs are used again."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tests" / "processes")]
