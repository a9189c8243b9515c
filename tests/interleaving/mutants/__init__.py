"""Each protocol rule, broken: the search must find every one. One file for each protocol."""

from __future__ import annotations

from .affinity import AFFINITY
from .bell import BELL
from .lanes import LANES
from .leases import LEASES
from .lifecycle import LIFECYCLE
from .metrics import METRICS
from .ring import RING
from .spread import SPREAD
from .takeover import TAKEOVER

MUTANTS = RING + BELL + LEASES + LANES + TAKEOVER + AFFINITY + METRICS + LIFECYCLE + SPREAD
"""Every mutant."""
