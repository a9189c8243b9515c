"""Logits in, experts and weights out: scoring, selection, the cache bonus, and the router that applies them.

Routing meets paging only through `shmroute.shared`.
"""

from shmroute.routing.bonus_control import AdaptiveCacheBonus
from shmroute.routing.router import MemoryAwareRouter, RoutingDecision

__all__ = ["AdaptiveCacheBonus", "MemoryAwareRouter", "RoutingDecision"]
